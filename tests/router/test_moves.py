"""Level moves against whatever else happens to a request: none is lost, none is broken by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from colm_serve.client import Finished, GenerationEvent, Started, Token
from colm_serve.config import RouterConfig, SlaClass, TenantConfig
from colm_serve.errors import (
    InvalidArgument,
    RowFailed,
    UnknownRequest,
    WorkerFailed,
)
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.transport.channel import connect
from colm_serve.transport.status import ERROR_KEY
from tests.router.cluster import ScriptedCluster, scripted_cluster
from tests.router.scripted import NUM_LEVELS, Script, next_token
from tests.worker_clients import eventually

NUM_REQUESTS = 2_000
NUM_AT_ONCE = 16
#: A scripted worker's step takes 10 ms a chain, and 1 ms a chain for each further row.
CLASSES = {"default": SlaClass(), "chat": SlaClass(tpot_ms=15)}


def follows(prompt: Sequence[int], got: Sequence[Token], seed: int) -> bool:
    """Whether each token is what the model says at its level after those before it."""
    tokens = list(prompt)
    for token in got:
        if token.token_id != next_token(tokens, seed, token.level):
            return False
        tokens.append(token.token_id)
    return True


async def many(one: Callable[[int], Awaitable[None]]) -> None:
    """NUM_REQUESTS, some at a time."""
    places = asyncio.Semaphore(NUM_AT_ONCE)

    async def in_turn(number: int) -> None:
        async with places:
            await one(number)

    await asyncio.gather(*map(in_turn, range(NUM_REQUESTS)))


async def test_two_thousand_requests_are_moved_as_they_end(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        num_late = 0

        async def one(number: int) -> None:
            nonlocal num_late
            got: list[Token] = []
            ends = []
            # Most have ended before they can be moved, some have not.
            max_tokens = 3 if number % 10 else 40
            request_id = ""
            stream = cluster.client.generate(
                token_ids=[5, 6], max_tokens=max_tokens, seed=number, temperature=1.0
            )
            async for event in stream:
                match event:
                    case Started():
                        request_id = event.request_id
                    case Token():
                        got.append(event)
                        if len(got) == 1 + number % 3:
                            try:
                                await cluster.client.set_level(request_id, 1 + number % 3)
                            except UnknownRequest:
                                num_late += 1
                    case Finished():
                        ends.append(event)
            assert len(ends) == 1
            assert len(got) == max_tokens
            assert follows([5, 6], got, seed=number)

        await many(one)
        assert num_late, "none had ended"
        assert num_late < NUM_REQUESTS, "all had ended"


async def test_two_thousand_requests_are_served_while_the_router_moves_them(
    tmp_path: Path,
) -> None:
    router = RouterConfig(status_interval_s=0.02, level_moves_per_s=1000)
    async with scripted_cluster(tmp_path, router=router, sla_classes=CLASSES) as cluster:

        async def one(number: int) -> None:
            is_long = number % 8 == 0
            body = {
                "prompt": [5, 6], "max_tokens": 40 if is_long else 2, "seed": number,
                "sla_class": "default" if is_long else "chat",
            }  # fmt: skip
            answer = await cluster.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]

        async def move() -> None:
            while True:
                cluster.router._levels.move()
                await asyncio.sleep(0)

        moving = asyncio.create_task(move())
        await many(one)
        moving.cancel()
        assert len(cluster.worker.moves) > 10, "the load made no moves"


async def levels_of(stream: AsyncIterator[GenerationEvent]) -> list[int]:
    return [event.level async for event in stream if isinstance(event, Token)]


async def begun(cluster: ScriptedCluster, **options: Any) -> tuple[str, asyncio.Task[list[int]]]:
    """A request that its worker holds after two tokens, and what will be the levels of all."""
    started: asyncio.Queue[str] = asyncio.Queue()
    has_two = asyncio.Event()

    async def levels() -> list[int]:
        got: list[int] = []
        async for event in cluster.client.generate(token_ids=[5], max_tokens=6, **options):
            if isinstance(event, Started):
                started.put_nowait(event.request_id)
            if isinstance(event, Token):
                got.append(event.level)
                if len(got) == 2:
                    has_two.set()
        return got

    task = asyncio.create_task(levels())
    async with asyncio.timeout(10):
        await has_two.wait()
        return await started.get(), task


async def test_an_ended_request_is_not_found_by_grpc(tmp_path: Path) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetLevel(generation_pb2.SetLevelRequest(request_id="gone", level=1))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert dict(caught.value.trailing_metadata() or ())[ERROR_KEY] == "UnknownRequest"


async def test_a_worker_killed_at_the_moment_of_a_move(tmp_path: Path) -> None:
    script = Script(hold_after=2, hangs_at_moves=True)
    async with scripted_cluster(tmp_path, num_decode=2, script=script) as cluster:
        request_id, task = await begun(cluster)
        victim = next(w for w in cluster.workers if w.num_open)
        other = next(w for w in cluster.workers if w is not victim)
        moving = asyncio.create_task(cluster.client.set_level(request_id, 2))
        await asyncio.wait_for(victim.moving.wait(), 10)
        await victim.stop()
        await moving
        other.resume.set()
        assert await task == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
async def test_a_move_that_fails_breaks_no_stream(tmp_path: Path, code: grpc.StatusCode) -> None:
    script = Script(hold_after=2, fail_moves=code)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        request_id, task = await begun(cluster)
        await cluster.client.set_level(request_id, 2)
        cluster.worker.resume.set()
        assert await task == [3] * 6


@pytest.mark.parametrize(
    "name", ["INTERNAL", "UNKNOWN", "ABORTED", "UNIMPLEMENTED", "OUT_OF_RANGE"]
)
async def test_a_worker_that_fails_for_its_own_reasons_is_left(tmp_path: Path, name: str) -> None:
    code = grpc.StatusCode[name]
    async with scripted_cluster(tmp_path, num_decode=2) as cluster:
        cluster.workers[0].script = Script(fail_after=2, fail_with=code)
        for seed in range(6):
            stream = cluster.client.generate(
                token_ids=[5, 6], max_tokens=6, seed=seed, temperature=1.0
            )
            got = [event async for event in stream if isinstance(event, Token)]
            assert len(got) == 6
            assert follows([5, 6], got, seed)
        assert cluster.workers[0].requests, "nothing went to the one that fails"


async def test_workers_that_all_fail_are_a_bad_gateway(tmp_path: Path) -> None:
    script = Script(fail_start=grpc.StatusCode.INTERNAL)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        with pytest.raises(WorkerFailed, match="d0: INTERNAL"):
            [event async for event in cluster.client.generate(token_ids=[5])]
        answer = await cluster.http.post("/v1/completions", json={"prompt": [5]})
        assert answer.status_code == 502


async def test_a_request_that_fails_by_itself_is_not_tried_elsewhere(tmp_path: Path) -> None:
    script = Script(fail_with_error=RowFailed("its scores are no numbers"), fail_after=1)
    async with scripted_cluster(tmp_path, num_decode=2, script=script) as cluster:
        with pytest.raises(RowFailed, match="no numbers"):
            [event async for event in cluster.client.generate(token_ids=[5])]
        assert sum(len(worker.requests) for worker in cluster.workers) == 1


async def test_a_client_moves_its_request_within_its_class(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    small, large = SlaClass(max_level=1), SlaClass(min_level=2)
    classes = {"small": small, "default": SlaClass(), "large": large}
    keys = {"api_keys": ["x" * 16], "sla_classes": ["small", "large"]}
    tenants = {"t": TenantConfig.model_validate(keys)}
    async with scripted_cluster(
        tmp_path, script=script, sla_classes=classes, tenants=tenants, api_key="x" * 16
    ) as cluster:
        small_id, of_small = await begun(cluster, sla_class="small")
        for level in (2, NUM_LEVELS):
            with pytest.raises(InvalidArgument, match=r"level: . is not allowed; allowed: 1 to 1"):
                await cluster.client.set_level(small_id, level)
        large_id, of_large = await begun(cluster, sla_class="large", level=3)
        with pytest.raises(InvalidArgument, match="level: 1 is not allowed; allowed: 2 to 3"):
            await cluster.client.set_level(large_id, 1)
        await cluster.client.set_level(large_id, 2)
        cluster.worker.resume.set()
        assert await of_small == [1] * 6
        assert await of_large == [3, 3, 2, 2, 2, 2]


async def test_a_planned_move_does_not_override_its_client(tmp_path: Path) -> None:
    """The plan is made, and the client's wish comes before it has been sent."""
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        request_id, task = await begun(cluster)
        running = cluster.router._running[request_id]
        running.move_level(1)
        sending = asyncio.create_task(running.send_level())
        running.set_level(2)
        await asyncio.gather(sending, cluster.client.set_level(request_id, 2))
        assert cluster.worker.moves[-1] == 2
        assert 1 not in cluster.worker.moves
        cluster.worker.resume.set()
        assert await task == [3, 3, 2, 2, 2, 2]


async def test_a_wish_from_before_its_admission_is_kept(tmp_path: Path) -> None:
    script = Script(holds_start=True, hold_after=1)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        stream = cluster.client.generate(token_ids=[5], max_tokens=3)
        task = asyncio.create_task(levels_of(stream))
        await asyncio.wait_for(cluster.worker.held.wait(), 10)
        [request_id] = cluster.router._running
        await cluster.client.set_level(request_id, 1)
        cluster.worker.may_admit.set()
        await eventually(lambda: cluster.worker.moves == [1], "the move")
        cluster.worker.resume.set()
        assert await task == [3, 1, 1]
