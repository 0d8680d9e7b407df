"""How the router treats workers that refuse, vanish, hang, or are not what they seem."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from colm_serve.client import Finished, GenerationEvent, Started, Token
from colm_serve.config import RouterConfig, SlaClass, StandbyConfig
from colm_serve.core import PrefillPeer, StepCost
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


def standby(worker_id: str = "p0-standby") -> ScriptedDecode:
    """A prefill worker's process that decodes too, with what it says of itself."""
    status = decode_status(
        worker_id=worker_id, num_levels=1, num_running=(0,), step_cost=StepCost((0.01,), (0.001,))
    )
    return ScriptedDecode(worker_id, status=status)


async def lose_the_last_decode_worker(cluster: ScriptedCluster, spare: ScriptedDecode) -> None:
    """Once it holds a request: it dies, and the controller turns to the prefill workers."""
    await cluster.worker.held.wait()
    await cluster.worker.stop()
    cluster.workers.append(spare)
    await cluster.join([replace(await spare.start(), is_standby=True)])


SOON = StandbyConfig(after_s=0.01)


@pytest.mark.parametrize("min_level", [1, 3])
async def test_a_text_is_finished_at_level_1_when_no_decode_worker_is_left(
    tmp_path: Path, min_level: int
) -> None:
    """Whatever level was asked for: a text that has begun is not lost."""
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, standby=SOON) as cluster:
        events: list[GenerationEvent] = []
        async for event in cluster.client.generate(
            token_ids=PROMPT, max_tokens=6, seed=1, min_level=min_level
        ):
            events.append(event)
            if len(token_ids(events)) == 1 and isinstance(event, Token):
                losing = asyncio.create_task(lose_the_last_decode_worker(cluster, standby()))
        await losing
        levels = [event.level for event in events if isinstance(event, Token)]
        num_before = levels.count(3)
        assert num_before in (1, 2)
        assert levels == [3] * num_before + [1] * (6 - num_before)
        before = continuation(PROMPT, num_before, 1, 3)
        after = continuation((*PROMPT, *before), 6 - num_before, 1, 1)
        assert token_ids(events) == before + after
        assert [type(e) for e in events].count(Started) == 1
        assert isinstance(events[-1], Finished)


async def test_a_text_that_leaves_its_standby_goes_back_to_its_level(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script, standby=SOON) as cluster:
        spare = standby()
        spare.script = Script(hold_after=1)
        losing = asyncio.create_task(lose_the_last_decode_worker(cluster, spare))
        back = ScriptedDecode("d1")
        levels = []
        async for event in cluster.client.generate(token_ids=PROMPT, max_tokens=6, seed=1):
            if not isinstance(event, Token):
                continue
            levels.append(event.level)
            if event.level == 1:
                await losing
                cluster.workers.append(back)
                await cluster.join([await back.start()])
        num_before = levels.index(1)
        assert levels == [3] * num_before + [1] + [3] * (5 - num_before)


async def test_a_standby_is_left_alone_while_a_decode_worker_answers(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, standby=SOON) as cluster:
        spare = standby()
        cluster.workers.append(spare)
        member = replace(await spare.start(), is_standby=True)
        await cluster.join([cluster.worker.member, member])
        for _ in range(3):
            await generate(cluster)
        assert (len(cluster.worker.requests), len(spare.requests)) == (3, 0)
        status = await cluster.client.status()
        assert [worker.kind for worker in status.workers] == ["decode", "standby"]


@pytest.mark.parametrize(("min_level", "is_served"), [(1, True), (2, False)])
async def test_a_new_request_takes_a_standby_only_if_level_1_will_do(
    tmp_path: Path, min_level: int, is_served: bool
) -> None:
    async with scripted_cluster(tmp_path, num_decode=0, standby=SOON, patience_s=0.3) as cluster:
        cluster.workers.append(standby())
        await cluster.join([replace(await cluster.worker.start(), is_standby=True)])
        stream = cluster.client.generate(
            token_ids=PROMPT, max_tokens=6, seed=1, min_level=min_level
        )
        if not is_served:
            with pytest.raises(Unavailable, match="no decode worker is reachable"):
                await anext(stream)
            return
        events = [event async for event in stream]
        assert isinstance(events[0], Started)
        assert events[0].level == 1
        assert token_ids(events) == continuation(PROMPT, 6, 1, 1)


async def test_a_worker_that_keeps_failing_is_left_alone_until_a_probe_succeeds(
    tmp_path: Path,
) -> None:
    """It breaks every text off, and answers every poll."""
    now = [0.0]
    router = RouterConfig(status_interval_s=0.02, breaker_failures=2, breaker_open_s=10)
    async with scripted_cluster(
        tmp_path, num_decode=2, router=router, clock=lambda: now[0]
    ) as cluster:
        bad, good = cluster.workers
        bad.script = Script(fail_after=1, fail_with=grpc.StatusCode.DATA_LOSS)
        expected = continuation(PROMPT, 6, 1, 3)
        while len(bad.requests) < 2:
            assert token_ids(await generate(cluster)) == expected
        num_at_good = len(good.requests)
        for _ in range(3):
            assert token_ids(await generate(cluster)) == expected
        assert (len(bad.requests), len(good.requests)) == (2, num_at_good + 3)
        bad.script = Script()
        await cluster.join([bad.member])
        task = asyncio.create_task(generate(cluster))
        for _ in range(3):
            await cluster.router.view.change().wait()
        assert len(bad.requests) == 2, "nobody else is there, but it is not asked yet"
        now[0] = 10.0
        assert token_ids(await task) == expected
        assert len(bad.requests) == 3
        assert b"colm:circuit_breakers_opened_total 1.0" in cluster.router.render_metrics()


async def test_retries_are_a_share_of_the_requests(tmp_path: Path) -> None:
    """A request that has had nothing yet fails; one that has waits for its retry."""
    router = RouterConfig(status_interval_s=0.02, max_concurrent=1, retry_share=0.0)
    async with scripted_cluster(tmp_path, num_decode=2, router=router) as cluster:
        for worker in cluster.workers:
            worker.script = Script(fail_start=grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(Unavailable, match="as scripted"):
            await generate(cluster)
        assert sum(len(worker.requests) for worker in cluster.workers) == 2
        assert b"colm:retries_denied_total 1.0" in cluster.router.render_metrics()
        await cluster.until(lambda: len(cluster.router.view.snapshot().decode) == 2)
        for worker in cluster.workers:
            worker.script = Script(fail_after=1, fail_with=grpc.StatusCode.DATA_LOSS)
        assert token_ids(await generate(cluster, max_tokens=3)) == continuation(PROMPT, 3, 1, 3)
