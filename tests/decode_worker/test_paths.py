"""The text of the whole model in one process, whatever way its keys and values take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from colm_serve.engine.loading import kv_layout
from colm_serve.errors import DeadlineExceeded
from colm_serve.transport.kv_frames import MESSAGE, SHARED_MEMORY
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
from tests.worker_clients import PrefillClient, decode_client, eventually, prefill_client

RING_BYTES = 8 * 1024 * 1024


@pytest.mark.parametrize("chunk_tokens", [1, 16, 48, 512])
@pytest.mark.parametrize("path", [MESSAGE, SHARED_MEMORY])
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
    expected = generate_alone(folder, prompt, [level] * 8)
    half = (*prompt[:50], *make_prompt(20, seed=3))
    with (
        prefill_service(folder, chunk_tokens=chunk_tokens) as (prefill, prefill_worker),
        decode_service(folder, 1, shared_memory=is_shared) as (cold, _),
        decode_service(folder, 2, shared_memory=is_shared) as (warm, worker),
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
    segment = ReceivingSegment(2 * 1024 * 1024)
    async with serving(folder, kv_tokens=4096, stall_timeout_s=0.5) as client:
        request = replace(client.request(make_prompt(2048, wide)), segment=segment.name)
        call = client.open(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_all(call), 20)
        assert isinstance(from_rpc_error(caught.value), DeadlineExceeded)
        await eventually(client.is_idle, "its pages come back")
    segment.close()


async def read_all(call: grpc.aio.UnaryStreamCall[object, bytes]) -> None:
    async for _ in call:
        pass
