"""Clients that do not read: others have their texts, and no page is freed while it is written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from colm_serve.core import DecodeRequest, PrefillPeer
from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.decode_worker.prefill_planner import PrefillPlanner
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.session import DecodeSession
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.errors import DeadlineExceeded
from colm_serve.transport import channel
from colm_serve.transport.channel_cache import ChannelCache
from colm_serve.transport.kv_frames import Frame
from tests.helpers import (
    GREEDY,
    decode_service,
    generate_alone,
    make_prompt,
    prefill_service,
    with_tokens,
)
from tests.worker_clients import DecodeClient, DecodeStream, decode_client, eventually

LEVEL = 2
#: What is on the way from a server to a client that does not read is a few tokens at most.
NARROW = [("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0)]


@asynccontextmanager
async def stalled_client(address: str, identity: str) -> AsyncIterator[DecodeClient]:
    async with grpc.aio.insecure_channel(address, options=NARROW) as narrow:
        yield DecodeClient(narrow, identity)


@pytest.fixture(autouse=True)
def narrow_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*channel._SERVER_OPTIONS, ("grpc.http2.write_buffer_size", 1)]
    monkeypatch.setattr(channel, "_SERVER_OPTIONS", options)


async def read_to_the_end(stream: DecodeStream) -> None:
    async with asyncio.timeout(60):
        await stream.rest()


async def test_a_preempted_request_that_nobody_reads_delays_no_older_one(folder: Path) -> None:
    """It loses its pages for the long one, has them back once that has ended, and is in the way
    of the other then, unless its keys and values come back although nobody reads.
    """
    long, other, stalled = make_prompt(200), make_prompt(10, seed=2), make_prompt(10, seed=3)
    with decode_service(folder, kv_tokens=640, expected_output_tokens=4) as (service, worker):
        async with (
            decode_client(service.address, worker.kv_identity) as client,
            stalled_client(service.address, worker.kv_identity) as slow,
        ):
            streams = [
                await c.open(c.request(prompt, LEVEL, with_tokens(GREEDY, num_tokens)))
                for c, prompt, num_tokens in (
                    (client, long, 150), (client, other, 500), (slow, stalled, 500),
                )
            ]  # fmt: skip
            await asyncio.gather(*map(read_to_the_end, streams[:2]))
            assert worker.status().num_preemptions > 0
            assert not streams[2].call.done(), "it was in the way to the end"
            await read_to_the_end(streams[2])
            await eventually(client.is_idle, "all pages are free")
    for prompt, stream in zip((long, other, stalled), streams, strict=True):
        assert stream.got.tokens == generate_alone(folder, prompt, [LEVEL] * len(stream.got.tokens))
        assert stream.got.end is not None


async def test_who_takes_nothing_loses_the_stream_and_its_pages(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with decode_service(folder, stall_timeout_s=0.5, max_rows=1) as (service, worker):
        async with (
            decode_client(service.address, worker.kv_identity) as client,
            stalled_client(service.address, worker.kv_identity) as slow,
        ):
            stream = await slow.open(
                slow.request(make_prompt(10), LEVEL, with_tokens(GREEDY, 2000))
            )
            await stream.tokens(1)
            got = await client.generate(make_prompt(20), LEVEL, GREEDY)
            await eventually(client.is_idle, "its pages are free", timeout_s=60)
            with pytest.raises(DeadlineExceeded, match=r"stall_timeout_s: 0\.5"):
                await read_to_the_end(stream)
    assert got.tokens == generate_alone(folder, make_prompt(20), [LEVEL] * 8)
    assert "took nothing for stall_timeout_s: 0.5" in caplog.text


class Held:
    """Holds the writing of frame 2, the second of a layer, until released."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self._accept = FrameWriter.accept
        accept = self._accept
        held = self

        def hold(writer: FrameWriter, message: bytes, lane: int = 0) -> Frame:
            if writer._num_frames[lane] == 2:
                held.has_begun.set()
                assert held.may_end.wait(60)
            return accept(writer, message, lane)

        patch.setattr(FrameWriter, "accept", hold)


async def run(session: DecodeSession) -> None:
    async with aclosing(session.events()) as events:
        async for _ in events:
            pass


def make_session(worker: DecodeWorker, address: str) -> tuple[DecodeSession, Any]:
    planner = PrefillPlanner(worker.local_load, worker.layout.num_layers)
    fetcher = PromptFetcher(
        worker.pool, worker.layout, worker.kv_identity, ChannelCache(None), 60.0, "raw", planner
    )
    request = DecodeRequest(
        "r", make_prompt(100), LEVEL, GREEDY, (PrefillPeer(address),), worker.kv_identity
    )
    session = DecodeSession(worker, fetcher, GrammarQueue(worker.grammars), request, 0)
    return session, fetcher


@pytest.mark.parametrize("num_cancels", [1, 2, 3])
async def test_pages_are_not_freed_while_a_frame_is_written_into_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_cancels: int
) -> None:
    held = Held(monkeypatch)
    with (
        prefill_service(folder) as (prefill, _),
        decode_service(folder) as (_, worker),
    ):
        session, fetcher = make_session(worker, prefill.address)
        task = asyncio.create_task(run(session))
        await eventually(held.has_begun.is_set, "a frame is being written")
        for _ in range(num_cancels):
            task.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
        status = worker.status()
        assert status.num_free_pages < status.num_pages
        assert not task.done()
        held.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        status = worker.status()
        assert status.num_free_pages == status.num_pages
        fetcher.close()
