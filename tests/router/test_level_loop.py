"""The router moves requests that run, through real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from colm_serve.client import Started, Token
from colm_serve.config import RouterConfig, SlaClass
from colm_serve.router.placing.outlook import Outlook
from tests.router.cluster import ScriptedCluster, scripted_cluster
from tests.router.scripted import Script

#: A scripted worker's step takes 10 ms a chain, and 1 ms a chain for each further row.
CLASSES = {"default": SlaClass(), "chat": SlaClass(tpot_ms=15)}


async def levels(
    cluster: ScriptedCluster, started: asyncio.Queue[str], sla_class: str
) -> list[int]:
    got = []
    stream = cluster.client.generate(token_ids=[5], max_tokens=6, sla_class=sla_class)
    async for event in stream:
        if isinstance(event, Started):
            started.put_nowait(event.request_id)
        if isinstance(event, Token):
            got.append(event.level)
    return got


async def moved_to(cluster: ScriptedCluster, moves: list[int]) -> None:
    async with asyncio.timeout(5):
        while cluster.worker.moves != moves:
            await asyncio.sleep(0.01)


async def test_who_runs_goes_down_for_who_comes(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, sla_classes=CLASSES) as cluster:
        started: asyncio.Queue[str] = asyncio.Queue()
        first = asyncio.create_task(levels(cluster, started, "default"))
        await started.get()
        second = asyncio.create_task(levels(cluster, started, "chat"))
        await moved_to(cluster, [1])
        cluster.worker.resume.set()
        assert await first == [3, 3, 1, 1, 1, 1]
        assert await second == [1] * 6
        metrics = (await cluster.http.get("/metrics")).text
        assert 'colm:level_moves_total{why="down"} 1.0' in metrics
        assert "colm:ttft_over_predicted_count 2.0" in metrics
        assert "colm:tpot_over_predicted_count 2.0" in metrics


async def test_newcomers_are_told_what_those_that_run_leave_to_them(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, sla_classes=CLASSES) as cluster:

        def outlook() -> Outlook | None:
            return cluster.router.view.snapshot().decode[0].outlook

        assert outlook() is None
        started: asyncio.Queue[str] = asyncio.Queue()
        running = asyncio.create_task(levels(cluster, started, "chat"))
        await started.get()
        cluster.router._levels.move()
        seen = outlook()
        assert seen is not None
        assert seen.tpot_s == 0.015
        cluster.worker.resume.set()
        await running
        cluster.router._levels.move()
        assert outlook() is None


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(status_interval_s=0.02, level_moves_per_s=0),
        RouterConfig(status_interval_s=0.02, policy="fixed_level", fixed_level=3),
    ],
)
async def test_nobody_is_moved_where_that_is_off(tmp_path: Path, router: RouterConfig) -> None:
    async with scripted_cluster(tmp_path, router=router, sla_classes=CLASSES) as cluster:
        assert cluster.router._levels._task is None
        assert await levels(cluster, asyncio.Queue(), "default") == [3] * 6


async def test_who_was_put_at_a_level_by_its_client_stays_there(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, sla_classes=CLASSES) as cluster:
        started: asyncio.Queue[str] = asyncio.Queue()
        first = asyncio.create_task(levels(cluster, started, "default"))
        first_id = await started.get()
        second = asyncio.create_task(levels(cluster, started, "chat"))
        await moved_to(cluster, [1])
        await cluster.client.set_level(first_id, 3)
        for _ in range(3):
            cluster.router._levels.move()
        await moved_to(cluster, [1, 3])
        cluster.worker.resume.set()
        assert await first == [3] * 6
        assert await second == [1] * 6
        assert cluster.worker.moves == [1, 3]
