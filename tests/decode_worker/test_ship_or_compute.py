"""Real workers that choose where a prompt is computed, by speeds that the tests say they have."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from colm_serve.core import PrefillRequest
from colm_serve.decode_worker import shipment
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport import kv_frames, serde
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.kv_frames import Frame, OpenFrame, Progress, WaitFrame
from tests.helpers import GREEDY, decode_service, generate_alone, make_prompt, prefill_service
from tests.worker_clients import (
    DecodeClient,
    Generation,
    PrefillClient,
    decode_client,
    eventually,
    prefill_client,
)

LEVEL = 2
#: So much faster or slower than anything that nothing else can decide.
FAST, SLOW = 1e9, 1e-9
NEVER_S = 3600.0


@dataclass(frozen=True)
class KnownRate:
    """Stands for a `Rate`, whatever is measured."""

    per_s: float

    def add(self, amount: float, seconds: float) -> None:
        """It is known already."""


def know(worker: DecodeWorker | PrefillWorker, name: str, tokens_per_s: float) -> None:
    assert hasattr(worker, name)
    setattr(worker, name, KnownRate(tokens_per_s))


@pytest.fixture
def nobody_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the prefill worker says can decide."""
    monkeypatch.setattr(shipment, "MIN_PATIENCE_S", NEVER_S)


@dataclass
class Pair:
    """A prefill and a decode worker whose speeds are known."""

    decode: DecodeClient
    prefill: PrefillClient
    prefill_worker: PrefillWorker
    gate: threading.Event

    async def generate(self, prompt: tuple[int, ...]) -> Generation:
        return await self.decode.generate(prompt, LEVEL, GREEDY, (self.prefill.address,))

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Long prompts stand before any other, and nothing is computed meanwhile."""
        self.gate.clear()
        calls = [
            asyncio.ensure_future(
                self.prefill.frames(self.prefill.request(make_prompt(1900, seed=i)))
            )
            for i in range(10, 22)
        ]
        await eventually(lambda: self._is_running(len(calls)), "they have pages", timeout_s=60)
        yield
        self.gate.set()
        await asyncio.gather(*calls)

    async def _is_running(self, num_prompts: int) -> bool:
        return (await self.prefill.status()).num_running == num_prompts


@asynccontextmanager
async def pair(folder: Path, *, local_tokens_per_s: float) -> AsyncIterator[Pair]:
    gate = threading.Event()
    gate.set()
    async with AsyncExitStack() as stack:
        p_service, p_worker = stack.enter_context(
            prefill_service(folder, before_block=lambda: gate.wait(60), kv_tokens=32768)
        )
        know(p_worker, "_rate", 1000.0)
        d_client = await stack.enter_async_context(deciding(folder, local_tokens_per_s))
        p_client = await stack.enter_async_context(
            prefill_client(p_service.address, d_client.kv_identity, p_worker.layout)
        )
        yield Pair(d_client, p_client, p_worker, gate)


@asynccontextmanager
async def deciding(folder: Path, local_tokens_per_s: float) -> AsyncIterator[DecodeClient]:
    """A client of a decode worker that is free to choose."""
    with decode_service(folder, adaptive_prefill=True, frame_timeout_s=NEVER_S) as (
        service,
        worker,
    ):
        know(worker, "_prefill_rate", local_tokens_per_s)
        async with decode_client(service.address, worker.kv_identity) as client:
            yield client
            await eventually(client.is_idle, "all decode pages are free", timeout_s=60)


@pytest.mark.usefixtures("nobody_is_late")
async def test_a_prompt_is_computed_here_while_there_is_a_long_queue(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = make_prompt(600)
    async with pair(folder, local_tokens_per_s=FAST) as p:
        with caplog.at_level(logging.WARNING, "colm_serve.decode_worker.prompt_kv"):
            async with p.busy():
                got = await p.generate(prompt)
        assert not caplog.records, "the prefill worker was left, it did not fail"
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 0


@pytest.mark.usefixtures("nobody_is_late")
async def test_what_a_busy_prefill_worker_has_cached_is_shipped_and_the_rest_computed_here(
    folder: Path,
) -> None:
    prompt = make_prompt(600)
    async with pair(folder, local_tokens_per_s=FAST) as p:
        await p.prefill.frames(p.prefill.request(prompt[:410]))
        async with p.busy():
            got = await p.generate(prompt)
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 400


async def test_a_slow_decode_worker_has_all_shipped(folder: Path) -> None:
    prompt = make_prompt(600)
    async with pair(folder, local_tokens_per_s=SLOW) as p:
        got = await p.generate(prompt)
        assert p.prefill_worker.num_computed_tokens == 599
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 599


#: What a prefill worker says in answer to a request, before it says nothing more.
Words = Callable[[PrefillRequest], Iterator[Frame]]


@asynccontextmanager
async def scripted_prefill(words: Words) -> AsyncIterator[str]:
    """The address of a prefill worker that never sends any keys and values."""

    async def prefill(message: prefill_pb2.PrefillRequest, context: Any) -> None:
        request = serde.prefill_request_from_proto(message)
        for frame in words(request):
            await context.write(kv_frames.encode(frame, request.stream_id))
        await asyncio.Event().wait()

    handler: Any = grpc.unary_stream_rpc_method_handler(
        prefill, request_deserializer=prefill_pb2.PrefillRequest.FromString
    )
    server = make_server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("colm.v1.PrefillService", {"Prefill": handler}),)
    )
    address = bind(server, "127.0.0.1", 0, None)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


def opening(request: PrefillRequest) -> OpenFrame:
    """It is idle, and the fastest there is."""
    return OpenFrame(
        0, 1, request.kv_identity, request.layout, request.codec, "message", 0, 0, 1e3 * FAST
    )


def says_nothing(request: PrefillRequest) -> Iterator[Frame]:
    return iter(())


def opens(request: PrefillRequest) -> Iterator[Frame]:
    yield opening(request)


def has_more_and_more_to_do(request: PrefillRequest) -> Iterator[Frame]:
    yield opening(request)
    for sequence in range(1, 20):
        yield WaitFrame(sequence, Progress(0, 10**sequence, 1e3 * FAST))


def slows_down(request: PrefillRequest) -> Iterator[Frame]:
    yield opening(request)
    yield WaitFrame(1, Progress(0, 0, 1e3 * FAST))
    yield WaitFrame(2, Progress(0, 0, SLOW))


def is_of_an_older_release(request: PrefillRequest) -> Iterator[Frame]:
    yield opening(request)
    yield WaitFrame(1)


async def generate_past(folder: Path, words: Words) -> None:
    """A prompt comes to its text although its prefill worker never sends anything of it."""
    prompt = make_prompt(600)
    async with (
        scripted_prefill(words) as address,
        deciding(folder, FAST) as client,
        asyncio.timeout(60),
    ):
        got = await client.generate(prompt, LEVEL, GREEDY, (address,))
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 0


@pytest.mark.parametrize("words", [says_nothing, opens, is_of_an_older_release])
async def test_a_worker_that_hangs_is_left_long_before_the_frame_timeout(
    folder: Path, words: Words
) -> None:
    await generate_past(folder, words)


@pytest.mark.usefixtures("nobody_is_late")
@pytest.mark.parametrize("words", [has_more_and_more_to_do, slows_down])
async def test_what_a_worker_says_while_it_is_waited_for_is_decided_on(
    folder: Path, words: Words
) -> None:
    await generate_past(folder, words)
