"""How the router treats workers that refuse, vanish, hang, or are not what they seem."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from colm_serve.client import GenerationEvent, Token
from colm_serve.config import RouterConfig, SlaClass
from colm_serve.core import PrefillPeer
from colm_serve.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from tests.router.cluster import ScriptedCluster, scripted_cluster
from tests.router.scripted import (
    Script,
    ScriptedDecode,
    ScriptedPrefill,
    continuation,
    decode_status,
)

PROMPT = (10, 11, 12)


async def generate(cluster: ScriptedCluster, max_tokens: int = 6) -> list[GenerationEvent]:
    stream = cluster.client.generate(token_ids=PROMPT, max_tokens=max_tokens, seed=1)
    return [event async for event in stream]


def token_ids(events: list[GenerationEvent]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


async def test_a_worker_without_room_is_passed_over(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=2) as cluster:
        cluster.workers[0].script = Script(fail_start=grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert token_ids(await generate(cluster)) == continuation(PROMPT, 6, 1, 3)
        assert [len(worker.requests) for worker in cluster.workers] == [1, 1]


async def test_when_all_have_no_room_the_client_is_told_when_to_come_again(tmp_path: Path) -> None:
    script = Script(fail_start=grpc.StatusCode.RESOURCE_EXHAUSTED)
    async with scripted_cluster(tmp_path, num_decode=2, script=script) as cluster:
        with pytest.raises(ResourceExhausted) as error:
            await generate(cluster)
        assert error.value.retry_after_s > 0
        # As many attempts as a request has.
        assert [len(worker.requests) for worker in cluster.workers] == [2, 2]


async def test_a_request_with_tokens_waits_for_room(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=2, script=Script(fail_after=2)) as cluster:
        full = decode_status(worker_id="d1", num_free_pages=0)
        cluster.workers[1].status = full
        await cluster.until(lambda: cluster.router.view.snapshot().decode[1].status == full)
        task = asyncio.create_task(generate(cluster))
        first, second = cluster.workers
        async with asyncio.timeout(5):
            while not first.requests:
                await cluster.router.view.change().wait()
        await first.stop()
        second.script = Script()
        second.status = decode_status(worker_id="d1")
        assert token_ids(await task) == continuation(PROMPT, 6, 1, 3)


async def test_attempts_are_bounded(tmp_path: Path) -> None:
    router = RouterConfig(status_interval_s=0.02, max_attempts=3)
    script = Script(fail_after=0)
    async with scripted_cluster(tmp_path, script=script, router=router) as cluster:
        with pytest.raises(Unavailable, match="as scripted"):
            await generate(cluster)
        assert len(cluster.worker.requests) == 3


async def test_a_new_request_waits_for_a_worker_to_appear(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=0) as cluster:
        task = asyncio.create_task(generate(cluster))
        while not cluster.router.num_running:
            await asyncio.sleep(0.005)
        cluster.workers.append(ScriptedDecode("late"))
        await cluster.join([await cluster.worker.start()])
        assert token_ids(await task) == continuation(PROMPT, 6, 1, 3)


async def test_but_not_for_ever(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=0, patience_s=0.05) as cluster:
        with pytest.raises(Unavailable, match="no decode worker is reachable"):
            await generate(cluster)


async def test_the_deadline_bounds_decoding(tmp_path: Path) -> None:
    sla = {"default": SlaClass(deadline_s=0.2)}
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, sla_classes=sla) as cluster:
        with pytest.raises(DeadlineExceeded):
            await generate(cluster)


async def test_the_deadline_bounds_waiting_to_resume(tmp_path: Path) -> None:
    sla = {"default": SlaClass(deadline_s=0.5)}
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, sla_classes=sla) as cluster:
        task = asyncio.create_task(generate(cluster))
        await cluster.worker.held.wait()
        await cluster.worker.stop()
        with pytest.raises(DeadlineExceeded, match="no decode worker is reachable"):
            await task


async def test_a_hung_worker_is_found_out_and_delays_no_other(tmp_path: Path) -> None:
    router = RouterConfig(status_interval_s=0.02, status_timeout_s=0.1)
    async with scripted_cluster(tmp_path, num_decode=2, router=router) as cluster:
        hung, other = cluster.workers
        hung.script = Script(hangs=True)
        await cluster.until(lambda: len(cluster.router.view.snapshot().decode) == 1)
        await generate(cluster)
        assert len(other.requests) == 1
        hung.script = Script()
        await cluster.until(lambda: len(cluster.router.view.snapshot().decode) == 2)


async def test_a_worker_with_other_weights_is_never_asked(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=2) as cluster:
        foreign, own = cluster.workers
        members = (replace(foreign.member, kv_identity="other"), own.member)
        await cluster.join_some(members, expected=(own.member,))
        for _ in range(3):
            await generate(cluster)
        assert (len(foreign.requests), len(own.requests)) == (0, 3)


async def test_prefill_workers_are_passed_on_in_order_of_their_queues(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        prefill = [ScriptedPrefill(f"p{i}", 100 - 10 * i) for i in range(4)]
        members = [await worker.start() for worker in prefill]
        await cluster.join([cluster.worker.member, *members])
        await generate(cluster)
        await prefill[3].stop()
        await cluster.until(lambda: len(cluster.router.view.snapshot().prefill) == 3)
        await generate(cluster)
        for worker in prefill:
            await worker.stop()
        peers = [PrefillPeer(member.address, member.epoch) for member in members]
        first, second = (r.prefill_peers for r in cluster.worker.requests)
        assert first == (peers[3], peers[2], peers[1])
        assert second == (peers[2], peers[1], peers[0])


async def test_simultaneous_requests_spread_before_any_status_tells(tmp_path: Path) -> None:
    router = RouterConfig(status_interval_s=60)
    script = Script(hold_after=1)
    async with scripted_cluster(tmp_path, num_decode=2, script=script, router=router) as cluster:
        tasks = [asyncio.create_task(generate(cluster)) for _ in range(6)]
        for worker in cluster.workers:
            await worker.held.wait()
            worker.resume.set()
        await asyncio.gather(*tasks)
        assert [len(worker.requests) for worker in cluster.workers] == [3, 3]
