"""Requests for which there is no room: they wait in a fair order, and only while it is worth it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from colm_serve.client import AsyncClient, GenerationEvent, Token
from colm_serve.config import RouterConfig, SlaClass, TenantConfig
from colm_serve.errors import ResourceExhausted
from tests.router.cluster import MODEL, ScriptedCluster, scripted_cluster
from tests.router.scripted import Script, decode_status

PROMPT = (10, 11, 12)
CLASSES = {
    "default": SlaClass(),
    "urgent": SlaClass(ttft_ms=20_000),
    "impatient": SlaClass(ttft_ms=150),
    "hopeless": SlaClass(ttft_ms=1),
}


async def generate(client: AsyncClient, sla_class: str = "default") -> list[GenerationEvent]:
    stream = client.generate(token_ids=PROMPT, max_tokens=2, sla_class=sla_class)
    return [event async for event in stream]


@asynccontextmanager
async def full_cluster(folder: Path, **options: Any) -> AsyncIterator[ScriptedCluster]:
    """One decode worker without a free page, as its statuses say."""
    async with scripted_cluster(folder, sla_classes=CLASSES, **options) as cluster:
        full = cluster.worker.status = decode_status(
            max_rows=32, num_running=(0, 0, 8), num_free_pages=0
        )
        await cluster.until(lambda: cluster.router.view.snapshot().decode[0].status == full)
        yield cluster


async def until_waiting(cluster: ScriptedCluster, number: int) -> None:
    def num_waiting() -> int:
        placer = cluster.router._served[MODEL].placer
        return sum(placer.num_waiting(tenant) for tenant in cluster.router.tenants.all)

    async with asyncio.timeout(5):
        while num_waiting() != number:
            await asyncio.sleep(0.002)


async def test_a_request_waits_for_room(tmp_path: Path) -> None:
    async with full_cluster(tmp_path) as cluster:
        tasks = [asyncio.create_task(generate(cluster.client)) for _ in range(3)]
        await until_waiting(cluster, 3)
        page = await cluster.http.get("/metrics")
        assert 'colm:num_requests_queued{tenant="anybody"} 3.0' in page.text
        assert cluster.worker.requests == []
        cluster.worker.status = decode_status()
        for events in await asyncio.gather(*tasks):
            assert sum(isinstance(event, Token) for event in events) == 2
        await until_waiting(cluster, 0)


async def test_it_is_refused_once_its_first_token_would_be_late(tmp_path: Path) -> None:
    async with full_cluster(tmp_path) as cluster:
        with pytest.raises(ResourceExhausted, match=r"no room for 5 .*; waited 0.1 s") as late:
            await generate(cluster.client, "impatient")
        with pytest.raises(ResourceExhausted, match=r"; waited 0.0 s"):
            await generate(cluster.client, "hopeless")
        # Eight rows of 256 tokens, 52 ms each, run there: one ends in 1.7 s.
        assert late.value.retry_after_s == pytest.approx(256 * 0.052 / 8, rel=0.1)
        body = {"prompt": list(PROMPT), "max_tokens": 2, "sla_class": "hopeless"}
        reply = await cluster.http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
        assert reply.json()["error"]["code"] == "overloaded"
        page = await cluster.http.get("/metrics")
        assert 'colm:request_refusals_total{reason="room"} 3.0' in page.text
        assert cluster.worker.requests == []


async def test_who_waits_no_more_is_forgotten(tmp_path: Path) -> None:
    async with full_cluster(tmp_path) as cluster:
        tasks = [asyncio.create_task(generate(cluster.client)) for _ in range(2)]
        await until_waiting(cluster, 2)
        tasks[0].cancel()
        await until_waiting(cluster, 1)
        cluster.worker.status = decode_status()
        assert len(await tasks[1]) == 4


async def test_the_next_in_line_is_served_as_soon_as_one_is_done(tmp_path: Path) -> None:
    """Nearest deadline first, and no status has to come in between."""
    router = RouterConfig(status_interval_s=60, max_concurrent=1)
    script = Script(hold_after=1)
    async with scripted_cluster(
        tmp_path, router=router, script=script, sla_classes=CLASSES
    ) as cluster:
        running = asyncio.create_task(generate(cluster.client))
        await cluster.worker.held.wait()
        order: list[str] = []

        async def wait(sla_class: str) -> None:
            await generate(cluster.client, sla_class)
            order.append(sla_class)

        tasks = []
        for number, sla_class in enumerate(("default", "urgent"), start=1):
            tasks.append(asyncio.create_task(wait(sla_class)))
            await until_waiting(cluster, number)
        cluster.worker.resume.set()
        await asyncio.gather(running, *tasks)
        assert order == ["urgent", "default"]


@pytest.mark.parametrize(
    ("tenant_weights", "class_weights"), [((1, 3), (1, 1)), ((1, 1), (1, 3)), ((2, 3), (1, 2))]
)
async def test_tenants_share_the_room_by_weight(
    tmp_path: Path, tenant_weights: tuple[float, ...], class_weights: tuple[float, ...]
) -> None:
    keys = {name: f"sk-{name}-0123456789abc" for name in ("light", "heavy")}
    tenants = {
        name: TenantConfig.model_validate({"api_keys": [keys[name]], "weight": weight})
        for name, weight in zip(keys, tenant_weights, strict=True)
    }
    classes = {name: SlaClass(weight=w) for name, w in zip(keys, class_weights, strict=True)}
    classes["default"] = SlaClass()
    router = RouterConfig(status_interval_s=0.02, max_concurrent=1)
    script = Script(hold_after=0)
    async with (
        scripted_cluster(
            tmp_path, router=router, script=script, tenants=tenants, sla_classes=classes
        ) as cluster,
        AsyncClient(cluster.service.grpc_address, api_key=keys["light"]) as light,
        AsyncClient(cluster.service.grpc_address, api_key=keys["heavy"]) as heavy,
    ):
        first = asyncio.create_task(generate(light))
        await cluster.worker.held.wait()
        order: list[str] = []

        async def wait(name: str, client: AsyncClient) -> None:
            await generate(client, name)
            order.append(name)

        # All of the light one's came first.
        clients = [("light", light)] * 8 + [("heavy", heavy)] * 12
        tasks = [asyncio.create_task(wait(*each)) for each in clients]
        await until_waiting(cluster, len(tasks))
        cluster.worker.resume.set()
        await asyncio.gather(first, *tasks)
        assert 2 <= order[:12].count("light") <= 4, order
        assert order[16:] == ["light"] * 4


async def test_who_waits_for_its_targets_lets_others_by(tmp_path: Path) -> None:
    classes = {"default": SlaClass(), "fast": SlaClass(tpot_ms=54)}
    async with scripted_cluster(tmp_path, sla_classes=classes) as cluster:
        # Beside eight rows of level 3 a step takes 52 ms at the least.
        busy = cluster.worker.status = decode_status(max_rows=32, num_running=(0, 0, 8))
        await cluster.until(lambda: cluster.router.view.snapshot().decode[0].status == busy)
        fast = [asyncio.create_task(generate(cluster.client, "fast")) for _ in range(6)]
        await until_waiting(cluster, 6)
        assert cluster.worker.requests == []
        for task in fast[:3]:
            task.cancel()
        await until_waiting(cluster, 3)
        assert len(await generate(cluster.client)) == 4
        cluster.worker.status = decode_status(max_rows=32)
        for task in fast[3:]:
            assert len(await task) == 4


async def test_a_full_line_turns_away_those_of_whom_there_are_most(tmp_path: Path) -> None:
    keys = {name: f"sk-{name}-0123456789abc" for name in ("many", "few")}
    tenants = {name: TenantConfig.model_validate({"api_keys": [key]}) for name, key in keys.items()}
    router = RouterConfig(status_interval_s=0.02, max_queued=2)
    async with (
        full_cluster(tmp_path, tenants=tenants, router=router) as cluster,
        AsyncExitStack() as stack,
    ):
        clients = {
            name: await stack.enter_async_context(
                AsyncClient(cluster.service.grpc_address, api_key=key)
            )
            for name, key in keys.items()
        }
        many = []
        for number in (1, 2):
            many.append(asyncio.create_task(generate(clients["many"])))
            await until_waiting(cluster, number)
        few = asyncio.create_task(generate(clients["few"]))
        with pytest.raises(ResourceExhausted, match="too many requests wait"):
            await many[1]
        with pytest.raises(ResourceExhausted, match="too many requests wait"):
            await generate(clients["many"])
        cluster.worker.status = decode_status()
        assert len(await many[0]) == len(await few) == 4


async def test_brownouts_are_told(tmp_path: Path) -> None:
    """Level 3 in 58 ms a token is for few rows; beside 8 there is time for level 2."""
    classes = {"default": SlaClass(), "fast": SlaClass(tpot_ms=58)}
    body = {"prompt": list(PROMPT), "max_tokens": 2, "sla_class": "fast"}
    async with scripted_cluster(tmp_path, sla_classes=classes) as cluster:

        async def levels(**more: object) -> tuple[str, str]:
            answer = await cluster.http.post("/v1/completions", json={**body, **more})
            assert answer.status_code == 200
            return headers(answer)

        assert await levels() == ("3", "false")
        assert await levels(level=1) == ("1", "false"), "asked for, not suffered"
        busy = cluster.worker.status = decode_status(max_rows=32, num_running=(8, 0, 0))
        await cluster.until(lambda: cluster.router.view.snapshot().decode[0].status == busy)
        assert await levels() == ("2", "true")
        assert await levels(stream=True) == ("2", "true")
        assert await levels(n=2) == ("2", "true")
        assert await levels(sla_class="default") == ("3", "false")
        started = (await generate(cluster.client, "fast"))[0]
        assert (started.level, started.is_brownout) == (2, True)  # type: ignore[union-attr]
        page = await cluster.http.get("/metrics")
        assert 'colm:request_brownouts_total{level="2"} 5.0' in page.text


def headers(answer: httpx.Response) -> tuple[str, str]:
    return answer.headers["colm-level"], answer.headers["colm-brownout"]
