"""Calls that are opened and cancelled at any point, and a prompt that is longer than any other."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
    prefill_service,
)
from tests.worker_clients import decode_client, eventually, prefill_client

NUM_CALLS = 200


@pytest.mark.parametrize("seed", [0, 1])
async def test_a_storm_of_cancels_leaves_nothing_behind(folder: Path, seed: int) -> None:
    """Some before the opening, some amid the frames, some after all; many share a prefix."""
    chance = random.Random(seed)
    prompts = [make_prompt(chance.randrange(1, 1500), seed=i % 3) for i in range(NUM_CALLS)]
    with prefill_service(folder, kv_tokens=4096, max_queued=32) as (service, worker):
        async with prefill_client(service.address, worker.kv_identity, worker.layout) as client:

            async def open_and_cancel(prompt: tuple[int, ...], num_messages: int) -> None:
                request = client.request(prompt, ship_from=chance.randrange(len(prompt)))
                call = client.open(request)
                try:
                    for _ in range(num_messages):
                        if not isinstance(await call.read(), bytes):
                            break
                finally:
                    call.cancel()

            calls = [open_and_cancel(prompt, chance.randrange(12)) for prompt in prompts]
            # Those beyond the queue's bound are refused, which is an error too.
            await asyncio.gather(*calls, return_exceptions=True)
            begin = time.perf_counter()
            answer = await client.frames(client.request(make_prompt(300, seed=9)))
            assert time.perf_counter() - begin < 5
            assert sum(frame.num_tokens for frame, _ in answer.kv) == 300 * TINY.num_layers
            await eventually(client.is_idle, "every page is free")
            worker.check_integrity()
            worker.check_alive()


async def test_a_storm_of_cancelled_requests_leaves_nothing_on_either_side(folder: Path) -> None:
    chance = random.Random(0)
    with (
        prefill_service(folder, kv_tokens=4096) as (p_service, p_worker),
        decode_service(folder, kv_tokens=16384, max_waiting=NUM_CALLS) as (d_service, d_worker),
    ):
        identity = d_worker.kv_identity
        async with (
            decode_client(d_service.address, identity) as decode,
            prefill_client(p_service.address, identity, p_worker.layout) as prefill,
        ):

            async def open_and_cancel(num_events: int) -> None:
                prompt = make_prompt(chance.randrange(2, 400), seed=num_events)
                stream = await decode.open(
                    decode.request(prompt, 1 + num_events % 3, GREEDY, (p_service.address,))
                )
                try:
                    for _ in range(num_events):
                        if await stream.next() is None:
                            break
                finally:
                    stream.cancel()

            calls = [open_and_cancel(chance.randrange(6)) for _ in range(NUM_CALLS)]
            await asyncio.gather(*calls, return_exceptions=True)
            prompt = make_prompt(300, seed=9)
            got = await decode.generate(prompt, 2, GREEDY, (p_service.address,))
            assert got.tokens == generate_alone(folder, prompt, [2] * 8)
            await eventually(decode.is_idle, "every decode page is free")
            await eventually(prefill.is_idle, "every prefill page is free")


async def test_a_long_prompt_takes_all_pages_and_short_ones_pass_through(tmp_path: Path) -> None:
    """10,000 tokens in a pool of 10,240: the rest of it is enough for the short ones."""
    config = replace(TINY, max_context=16384)
    folder = make_model_folder(tmp_path / "long", config)
    blocks = threading.Semaphore(0)
    with prefill_service(
        folder,
        before_block=lambda: blocks.acquire(timeout=60),
        kv_tokens=10240,
        chunk_tokens=256,
    ) as (service, worker):
        async with prefill_client(service.address, worker.kv_identity, worker.layout) as client:
            long = asyncio.create_task(client.frames(client.request(make_prompt(10_000))))
            # Two passes of the 40 that it takes alone.
            blocks.release(2 * (TINY.num_layers - 1))
            await eventually(lambda: worker.num_computed_tokens == 512, "it is under way")
            shorts = [client.open(client.request(make_prompt(70, seed=i))) for i in (2, 3, 4)]
            await asyncio.gather(*(short.read() for short in shorts))
            # A third pass was begun before they came; two more have a share for each of them.
            blocks.release(3 * (TINY.num_layers - 1))
            for short in shorts:
                while isinstance(await short.read(), bytes):
                    pass
            assert not long.done(), "they did not wait for it"
            blocks.release(1000)
            answer = await long
        assert sum(frame.num_tokens for frame, _ in answer.kv) == 10_000 * TINY.num_layers
