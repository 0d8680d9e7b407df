"""The text of the whole model in one process, whatever way its keys and values take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from colm_serve.engine.loading import kv_layout
from colm_serve.errors import ColmError, DeadlineExceeded, InvalidArgument, Unavailable
from colm_serve.prefill_worker.lanes import Lane
from colm_serve.transport.kv_frames import MESSAGE, SHARED_MEMORY, KvFrame, decode, lane_id
from colm_serve.transport.shared_memory import ReceivingSegment, SendingSegment
from colm_serve.transport.status import from_rpc_error
from tests.engine.paged import open_chain_1
from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
    prefill_service,
)
from tests.worker_clients import STREAM_ID, PrefillClient, decode_client, eventually, prefill_client

RING_BYTES = 8 * 1024 * 1024


@pytest.mark.parametrize("chunk_tokens", [1, 16, 48, 512])
@pytest.mark.parametrize("path", [MESSAGE, SHARED_MEMORY, "connections"])
async def test_tokens_depend_on_no_chunk_size_prefix_or_path(
    folder: Path, path: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_puts = 0
    put = SendingSegment.put

    def count(segment: SendingSegment, parts: list[memoryview]) -> bytes:
        nonlocal num_puts
        num_puts += 1
        return put(segment, parts)

    monkeypatch.setattr(SendingSegment, "put", count)
    prompt = make_prompt(100, seed=chunk_tokens)
    level, is_shared = 2, path == SHARED_MEMORY
    num_connections = 2 if path == "connections" else 1
    config: dict[str, Any] = {"shared_memory": is_shared, "kv_connections": num_connections}
    expected = generate_alone(folder, prompt, [level] * 8)
    half = (*prompt[:50], *make_prompt(20, seed=3))
    with (
        prefill_service(folder, chunk_tokens=chunk_tokens) as (prefill, prefill_worker),
        decode_service(folder, 1, **config) as (cold, _),
        decode_service(folder, 2, **config) as (warm, worker),
    ):
        async with (
            decode_client(cold.address, worker.kv_identity) as first,
            decode_client(warm.address, worker.kv_identity) as second,
        ):
            peer = (prefill.address,)
            # Nobody knows anything; the prefill worker knows all; the decode worker knows half,
            # then all but the last block.
            assert (await first.generate(prompt, level, GREEDY, peer)).tokens == expected
            num_computed = prefill_worker.status().num_computed_tokens
            await second.generate(half, level, GREEDY, peer)
            got = await second.generate(prompt, level, GREEDY, peer)
            assert (got.tokens, got.num_cached, got.num_shipped) == (expected, 48, 51)
            got = await second.generate(prompt, level, GREEDY, peer)
            assert (got.tokens, got.num_cached, got.num_shipped) == (expected, 96, 3)
            assert prefill_worker.status().num_computed_tokens < num_computed + 2 * 100
    assert (num_puts > 0) is is_shared


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[PrefillClient]:
    with prefill_service(folder, **changes) as (service, worker):
        layout = kv_layout(open_chain_1(folder))
        async with prefill_client(service.address, worker.kv_identity, layout) as client:
            yield client


async def test_a_segment_that_cannot_be_opened_is_done_without(folder: Path) -> None:
    segment = ReceivingSegment(RING_BYTES)
    async with serving(folder) as client:
        request = client.request(make_prompt(40))
        for name, path in (
            (segment.name, SHARED_MEMORY),
            (replace(segment.name, nonce=segment.name.nonce ^ 1), MESSAGE),
            (replace(segment.name, ring_bytes=1), MESSAGE),
            (replace(segment.name, fd=10**6), MESSAGE),
        ):
            answer = await client.frames(replace(request, segment=name))
            assert answer.opening.path == path
            assert (len(answer.kv[0][1]) == 24) is (path == SHARED_MEMORY)
    segment.close()


async def test_a_receiver_that_frees_no_room_is_cut(tmp_path: Path) -> None:
    wide = replace(TINY, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=32)
    folder = make_model_folder(tmp_path / "wide", wide)
    segment = ReceivingSegment(RING_BYTES)
    async with serving(folder, kv_tokens=4096, stall_timeout_s=0.5) as client:
        request = replace(client.request(make_prompt(2048, wide)), segment=segment.name)
        call = client.open(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_all(call), 20)
        assert isinstance(from_rpc_error(caught.value), DeadlineExceeded)
        await eventually(client.is_idle, "its pages come back")
    segment.close()


async def test_lanes_share_the_layers_out(folder: Path) -> None:
    async with serving(folder) as client:
        request = replace(client.request(make_prompt(40)), num_lanes=2)
        call = client.open(request)
        opening = await next_message(call)
        lane = await read_all(client.open_lane(STREAM_ID, 1))
        first = [opening, *await read_all(call)]
    layers = [
        [frame.layer for frame in frames if isinstance(frame, KvFrame)]
        for frames in (
            [decode(message, lane_id(STREAM_ID, i), n)[0] for n, message in enumerate(messages)]
            for i, messages in enumerate((first, lane))
        )
    ]
    assert layers == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("stream_id", "lane", "error"),
    [(1, 1, Unavailable), (STREAM_ID, 0, InvalidArgument), (STREAM_ID, 2, InvalidArgument)],
)
async def test_a_lane_that_is_not_there_is_refused(
    folder: Path, stream_id: int, lane: int, error: type[ColmError]
) -> None:
    async with serving(folder) as client:
        call = client.open(replace(client.request(make_prompt(40)), num_lanes=2))
        await next_message(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(client.open_lane(stream_id, lane))
        assert isinstance(from_rpc_error(caught.value), error)
        call.cancel()


async def test_a_lane_is_sent_once(folder: Path) -> None:
    async with serving(folder, chunk_tokens=1) as client:
        call = client.open(replace(client.request(make_prompt(400)), num_lanes=2))
        await next_message(call)
        lane = client.open_lane(STREAM_ID, 1)
        await next_message(lane)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(client.open_lane(STREAM_ID, 1))
        assert isinstance(from_rpc_error(caught.value), InvalidArgument)
        await asyncio.gather(read_all(call), read_all(lane))


async def test_too_many_lanes_are_refused(folder: Path) -> None:
    async with serving(folder) as client:
        with pytest.raises(InvalidArgument, match="num_lanes"):
            await client.messages(replace(client.request(make_prompt(40)), num_lanes=17))


async def test_lanes_end_with_their_call(folder: Path) -> None:
    async with serving(folder, chunk_tokens=1) as client:
        call = client.open(replace(client.request(make_prompt(1600)), num_lanes=2))
        await next_message(call)
        lane = client.open_lane(STREAM_ID, 1)
        await next_message(lane)
        call.cancel()
        # Without an end frame, by which the receiver sees that it was cut.
        assert all(b"end" not in message for message in await read_all(lane))
        await eventually(client.is_idle, "its pages come back")


async def test_a_lane_that_nobody_takes_ends_the_stream(folder: Path) -> None:
    async with serving(folder, chunk_tokens=1, stall_timeout_s=0.5) as client:
        request = replace(client.request(make_prompt(100)), num_lanes=2)
        with pytest.raises(DeadlineExceeded):
            await client.messages(request)
        await eventually(client.is_idle, "its pages come back")


async def test_a_lane_that_fails_changes_no_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt(100, seed=5)
    put, num_put = Lane.put, Counter[Lane]()

    async def fail_later(lane: Lane, frame: bytes | None) -> None:
        num_put[lane] += 1
        await put(lane, frame if num_put[lane] < 4 else b"damaged")

    monkeypatch.setattr(Lane, "put", fail_later)
    with (
        prefill_service(folder, chunk_tokens=16) as (prefill, _),
        decode_service(folder, shared_memory=False, kv_connections=2) as (service, worker),
    ):
        async with decode_client(service.address, worker.kv_identity) as decode_worker:
            got = await decode_worker.generate(prompt, 2, GREEDY, (prefill.address,))
            await eventually(decode_worker.is_idle, "all pages are free")
    assert got.tokens == generate_alone(folder, prompt, [2] * 8)
    assert 0 < got.num_shipped < 99


async def next_message(call: grpc.aio.UnaryStreamCall[object, bytes]) -> bytes:
    message = await call.read()
    assert isinstance(message, bytes)
    return message


async def read_all(call: grpc.aio.UnaryStreamCall[object, bytes]) -> list[bytes]:
    """The rest of the messages; `async for` does not go with `read` on one call."""
    messages = []
    while isinstance(message := await call.read(), bytes):
        messages.append(message)
    return messages
