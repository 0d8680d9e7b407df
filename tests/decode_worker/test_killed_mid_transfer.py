"""Either side of a transfer is killed at any point of it: the other gives everything back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import pytest

from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.engine.loading import kv_layout
from colm_serve.errors import ColmError
from colm_serve.prefill_worker.frame_packer import FramePacker
from colm_serve.transport.kv_frames import MESSAGE, SHARED_MEMORY
from tests.engine.paged import open_chain_1
from tests.forked_worker import forked
from tests.helpers import GREEDY, TINY, decode_service, generate_alone, make_prompt, prefill_service
from tests.segments import num_segments
from tests.trap import Trap
from tests.worker_clients import decode_client, eventually, prefill_client

CHUNK_TOKENS = 16
NUM_TOKENS = 161
#: KV frames of a whole transfer: a chunk's layers each.
NUM_FRAMES = (NUM_TOKENS - 1) // CHUNK_TOKENS * TINY.num_layers
NUM_POINTS = 50
LEVEL = 2


def points(seed: int) -> list[Any]:
    """Frames, and the paths they take, at which to kill; every path and region of a transfer."""
    random = Random(seed)
    return [
        pytest.param((MESSAGE, SHARED_MEMORY)[i % 2], random.randint(1, NUM_FRAMES), id=str(i))
        for i in range(NUM_POINTS // 2)
    ]


@pytest.fixture
def on_received(monkeypatch: pytest.MonkeyPatch) -> Trap:
    """Sprung before a KV frame is written at the decode worker."""
    trap = Trap()
    trap.watch(monkeypatch, FrameWriter, "_take")
    return trap


@pytest.fixture
def on_sent(monkeypatch: pytest.MonkeyPatch) -> Trap:
    """Sprung before a KV frame is packed at the prefill worker."""
    trap = Trap()
    trap.watch(monkeypatch, FramePacker, "_encode_kv")
    return trap


@pytest.fixture(scope="module")
def survivors(folder: Path) -> Iterator[dict[str, tuple[str, str]]]:
    """Address and identity of a decode worker for each path, and of a prefill worker."""
    with ExitStack() as stack:
        prefill, _ = stack.enter_context(prefill_service(folder, 9, chunk_tokens=CHUNK_TOKENS))
        found = {}
        for path in (MESSAGE, SHARED_MEMORY):
            service, worker = stack.enter_context(
                decode_service(folder, shared_memory=path == SHARED_MEMORY)
            )
            found[path] = (service.address, worker.kv_identity)
        found["prefill"] = (prefill.address, worker.kv_identity)
        yield found


@pytest.mark.parametrize(("path", "point"), points(seed=1))
async def test_a_prefill_worker_dies(
    folder: Path,
    survivors: dict[str, tuple[str, str]],
    on_received: Trap,
    path: str,
    point: int,
    request: pytest.FixtureRequest,
) -> None:
    prompt = make_prompt(NUM_TOKENS, seed=crc32(request.node.name.encode()))
    before = num_segments(os.getpid())
    with forked("prefill", folder, chunk_tokens=CHUNK_TOKENS) as victim:
        async with decode_client(*survivors[path]) as decode:
            on_received.set(point, victim.kill)
            got = await decode.generate(prompt, LEVEL, GREEDY, (victim.address,))
            assert not victim.process.is_alive()
            await eventually(decode.is_idle, "all pages are free")
    # What the dead worker had delivered was kept, the rest computed here.
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert on_received.num_seen >= point
    assert got.num_shipped < NUM_TOKENS
    assert num_segments(os.getpid()) == before


@pytest.mark.parametrize(("path", "point"), points(seed=2))
async def test_a_decode_worker_dies(
    folder: Path,
    survivors: dict[str, tuple[str, str]],
    on_sent: Trap,
    path: str,
    point: int,
    request: pytest.FixtureRequest,
) -> None:
    prompt = make_prompt(NUM_TOKENS, seed=crc32(request.node.name.encode()))
    address, kv_identity = survivors["prefill"]
    before = num_segments(os.getpid())
    with forked("decode", folder, shared_memory=path == SHARED_MEMORY) as victim:
        async with (
            decode_client(victim.address, kv_identity) as decode,
            prefill_client(address, kv_identity, kv_layout(open_chain_1(folder))) as prefill,
        ):
            on_sent.set(point, victim.kill)
            with pytest.raises(ColmError):
                await decode.generate(prompt, LEVEL, GREEDY, (address,))
            assert on_sent.num_seen >= point
            await eventually(prefill.is_idle, "all pages are free")
            await eventually(lambda: num_segments(os.getpid()) == before, "no segment is mapped")
