"""Generation through real gRPC: events, usage, failover, cancellation, levels."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from colm_serve.client import Finished, GenerationEvent, Started, Token
from colm_serve.config import SlaClass
from colm_serve.core import FinishReason
from colm_serve.router.request import GenerationRequest, TokenPrompt
from tests.router.cluster import MODEL, ScriptedCluster, scripted_cluster, until_closed
from tests.router.scripted import Script, continuation, decode_status

PROMPT = (10, 11, 12)


async def generate(cluster: ScriptedCluster, **options: object) -> list[GenerationEvent]:
    stream = cluster.client.generate(**options)  # type: ignore[arg-type]
    return [event async for event in stream]


def token_ids(events: list[GenerationEvent]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def last(events: list[GenerationEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


async def test_a_generation_is_started_tokens_finished(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(num_cached=1)) as cluster:
        events = await generate(cluster, token_ids=PROMPT, max_tokens=5, seed=7)
        assert isinstance(events[0], Started)
        assert (events[0].model, events[0].level) == (MODEL, 3)
        assert token_ids(events) == continuation(PROMPT, 5, 7, 3)
        finished = last(events)
        assert finished.reason is FinishReason.LENGTH
        usage = finished.usage
        assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 5)
        assert (usage.num_cached_tokens, usage.num_shipped_tokens) == (1, 2)
        assert finished.timings.prefill_s == 0.5
        assert finished.timings.ttft_s > 0
        assert len(events) == 7
        assert cluster.worker.requests[0].request_id == events[0].request_id


async def test_a_worker_hears_when_the_first_token_is_due(tmp_path: Path) -> None:
    classes = {"default": SlaClass(), "chat": SlaClass(ttft_ms=60_000)}
    async with scripted_cluster(tmp_path, sla_classes=classes) as cluster:
        await generate(cluster, token_ids=PROMPT, max_tokens=5)
        await generate(cluster, token_ids=PROMPT, max_tokens=5, sla_class="chat")
        never, soon = (request.ttft_s for request in cluster.worker.requests)
    assert never is None
    assert soon == pytest.approx(60, abs=10)


async def test_events_carry_the_text(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        events = await generate(cluster, token_ids=PROMPT, max_tokens=40, seed=3)
        text = "".join(e.text for e in events if isinstance(e, Token | Finished))
        said = GenerationRequest(TokenPrompt(tuple(token_ids(events))))
        assert text == cluster.router.prompt_text(said)


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DATA_LOSS]
)
@pytest.mark.parametrize("num_before", [0, 1, 4])
async def test_failover_neither_repeats_nor_loses_a_token(
    tmp_path: Path, code: grpc.StatusCode, num_before: int
) -> None:
    async with scripted_cluster(tmp_path, num_decode=2) as cluster:
        for worker in cluster.workers:
            worker.script = Script(fail_after=num_before, fail_with=code)
        cluster.workers[1].script = Script()
        events = await generate(cluster, token_ids=PROMPT, max_tokens=9, seed=5)
        assert token_ids(events) == continuation(PROMPT, 9, 5, 3)
        assert sum(isinstance(e, Started) for e in events) == 1
        assert last(events).usage.num_prompt_tokens == 3
        assert last(events).usage.num_output_tokens == 9


async def test_a_killed_worker_is_left_and_its_successor_used(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=4)) as cluster:
        task = asyncio.create_task(generate(cluster, token_ids=PROMPT, max_tokens=9, seed=5))
        await asyncio.wait_for(cluster.worker.held.wait(), 5)
        await cluster.worker.stop()
        successor = type(cluster.worker)("d0", epoch=2)
        cluster.workers.append(successor)
        await cluster.join([await successor.start()])
        assert token_ids(await task) == continuation(PROMPT, 9, 5, 3)
        # What the dead worker had sent may not all have arrived.
        resumed = successor.requests[0]
        num_had = len(resumed.prompt) - len(PROMPT)
        assert num_had <= 4
        assert resumed.prompt == (*PROMPT, *continuation(PROMPT, num_had, 5, 3))
        assert resumed.sampling.max_tokens == 9 - num_had


async def test_an_evicted_member_hands_its_requests_on(tmp_path: Path) -> None:
    """The worker's process hangs rather than dies; its leaving the membership is the news."""
    async with scripted_cluster(tmp_path, num_decode=2, script=Script(hold_after=2)) as cluster:
        task = asyncio.create_task(generate(cluster, token_ids=PROMPT, max_tokens=6, seed=5))
        while not any(worker.held.is_set() for worker in cluster.workers):
            await asyncio.sleep(0.01)
        hung, other = sorted(cluster.workers, key=lambda worker: not worker.held.is_set())
        other.script = Script()
        await cluster.join([other.member])
        assert token_ids(await task) == continuation(PROMPT, 6, 5, 3)
        await until_closed(hung)


async def test_a_worker_that_dies_after_the_last_token_costs_nothing(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(finishes=False)) as cluster:
        events = await generate(cluster, token_ids=PROMPT, max_tokens=4, seed=1)
        assert token_ids(events) == continuation(PROMPT, 4, 1, 3)
        assert last(events).reason is FinishReason.LENGTH
        assert len(cluster.worker.requests) == 1


async def test_end_of_text_before_a_death_is_a_stop(tmp_path: Path) -> None:
    script = Script(end_of_text_at=2, finishes=False)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        events = await generate(cluster, token_ids=PROMPT, max_tokens=9, seed=1)
        assert len(token_ids(events)) == 3
        assert last(events).reason is FinishReason.STOP


async def test_client_cancellation_reaches_the_worker(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=2)) as cluster:
        async with aclosing(cluster.client.generate(token_ids=list(PROMPT))) as events:
            for _ in range(3):
                await anext(events)
        await until_closed(cluster.worker)
        assert cluster.worker.num_cancelled == 1


async def test_a_stop_string_ends_the_text_and_the_call(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        full = await generate(cluster, token_ids=PROMPT, max_tokens=30, seed=2)
        text = "".join(e.text for e in full if isinstance(e, Token | Finished))
        stop = text[8:11]
        cut = await generate(cluster, token_ids=PROMPT, max_tokens=30, seed=2, stop=stop)
        got = "".join(e.text for e in cut if isinstance(e, Token | Finished))
        assert got == text[: text.index(stop)]
        assert last(cut).reason is FinishReason.STOP
        assert last(cut).usage.num_output_tokens == len(token_ids(cut)) < 30


async def test_set_level_moves_a_running_request(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=2)) as cluster:
        levels = []
        async with aclosing(
            cluster.client.generate(token_ids=list(PROMPT), max_tokens=6)
        ) as events:
            started = await anext(events)
            assert isinstance(started, Started)
            await cluster.worker.held.wait()
            await cluster.client.set_level(started.request_id, 1)
            while not cluster.worker.moves:
                await asyncio.sleep(0.005)
            cluster.worker.resume.set()
            async for event in events:
                if isinstance(event, Token):
                    levels.append(event.level)
        assert levels == [3, 3, 1, 1, 1, 1]


async def test_a_moved_request_keeps_its_level_through_failover(tmp_path: Path) -> None:
    script = Script(hold_after=2, fail_after=3)
    async with scripted_cluster(tmp_path, num_decode=2, script=script) as cluster:
        levels = []
        async with aclosing(
            cluster.client.generate(token_ids=list(PROMPT), max_tokens=6)
        ) as events:
            started = await anext(events)
            assert isinstance(started, Started)
            first = next(w for w in cluster.workers if w.requests)
            await first.held.wait()
            await cluster.client.set_level(started.request_id, 2)
            while not first.moves:
                await asyncio.sleep(0.005)
            for worker in cluster.workers:
                if worker is not first:
                    worker.script = Script()
            first.resume.set()
            async for event in events:
                if isinstance(event, Token):
                    levels.append(event.level)
        assert levels == [3, 3, 2, 2, 2, 2]


async def test_a_conversation_stays_where_its_prefix_is(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=3) as cluster:
        first, second, _ = cluster.workers
        busy = first.status = decode_status(worker_id="d0", num_running=(0, 0, 2))
        await cluster.until(lambda: cluster.router.view.snapshot().decode[0].status == busy)
        conversation = list(range(20, 84))
        events = await generate(cluster, token_ids=conversation, max_tokens=8)
        conversation += [*token_ids(events), 5, 6, 7]
        assert len(second.requests) == 1
        idle = first.status = decode_status(worker_id="d0")
        await cluster.until(lambda: cluster.router.view.snapshot().decode[0].status == idle)
        await generate(cluster, token_ids=conversation, max_tokens=8)
        assert [len(worker.requests) for worker in cluster.workers] == [0, 2, 0]
        await generate(cluster, token_ids=conversation[1:], max_tokens=8)
        assert [len(worker.requests) for worker in cluster.workers] == [1, 2, 0]


async def test_choices_go_where_the_first_one_left_the_prompt(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=3) as cluster:
        body = {"prompt": list(range(20, 116)), "max_tokens": 4, "n": 3}
        assert (await cluster.http.post("/v1/completions", json=body)).status_code == 200
        assert sorted(len(worker.requests) for worker in cluster.workers) == [0, 0, 3]
