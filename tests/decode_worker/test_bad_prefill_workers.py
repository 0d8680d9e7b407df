"""Prefill workers whose streams are damaged, stop or break off: the text stays what it was."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from colm_serve.core import PrefillPeer
from tests.frame_mutations import KINDS, Mutation
from tests.helpers import GREEDY, decode_service, generate_alone, make_prompt, prefill_service
from tests.relay import Relay, Tamper, end, hang, vanish
from tests.worker_clients import DecodeClient, Generation, decode_client, eventually

PROMPT = make_prompt(120)
LEVEL = 3
FRAME_TIMEOUT_S = 1.0


@dataclass
class Fleet:
    """A decode worker, a relay before a prefill worker, and that worker itself."""

    decode: DecodeClient
    relay: PrefillPeer
    spare: PrefillPeer

    async def generate(self, *peers: PrefillPeer, salt: str = "") -> Generation:
        """Requests of one salt share cached KV, others do not."""
        request = self.decode.request(PROMPT, LEVEL, GREEDY)
        request = replace(request, prefill_peers=peers, cache_salt=salt)
        return await (await self.decode.open(request)).rest()


@asynccontextmanager
async def fleet(
    folder: Path, tamper: Tamper, after: Callable[[Relay], Any] = end
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        prefill, p_worker = stack.enter_context(prefill_service(folder, chunk_tokens=32))
        decode, d_worker = stack.enter_context(
            decode_service(folder, frame_timeout_s=FRAME_TIMEOUT_S)
        )
        client = await stack.enter_async_context(
            decode_client(decode.address, d_worker.kv_identity)
        )
        relay = Relay(prefill.address, tamper, after)
        address = await relay.start()
        stack.push_async_callback(relay.stop)
        yield Fleet(
            client,
            PrefillPeer(address, p_worker.epoch),
            PrefillPeer(prefill.address, p_worker.epoch),
        )
        await eventually(client.is_idle, "all decode pages are free")


async def test_a_damaged_stream_changes_no_token(folder: Path) -> None:
    """One stream a seed; what it had brought is kept, the rest comes of the spare or from here."""
    expected = generate_alone(folder, PROMPT, [LEVEL] * 8)
    chance = random.Random(0)

    def damage(messages: list[bytes], foreign: list[bytes]) -> Sequence[bytes]:
        where = (chance.randrange(2**16) for _ in range(3))
        return Mutation(next(kinds), *where).apply(messages, foreign)

    kinds = iter(KINDS * 4)
    num_whole = 0
    async with fleet(folder, damage) as f:
        for seed in range(len(KINDS) * 4):
            peers = (f.relay, f.spare) if seed % 2 else (f.relay,)
            got = await f.generate(*peers, salt=str(seed))
            assert got.tokens == expected
            assert got.num_shipped == 119 or seed % 2 == 0
            num_whole += got.num_shipped == 119
    assert num_whole < len(KINDS) * 4


@pytest.mark.parametrize("after", [end, hang, vanish])
@pytest.mark.parametrize("num_messages", [0, 1, 5])
async def test_a_stream_that_stops_is_left_in_time(
    folder: Path, after: Callable[[Relay], Any], num_messages: int
) -> None:
    """Before its opening, after it, or amid the second chunk of four."""
    expected = generate_alone(folder, PROMPT, [LEVEL] * 8)
    async with fleet(folder, lambda messages, _: messages[:num_messages], after) as f:
        begin = time.perf_counter()
        alone = await f.generate(f.relay, salt="alone")
        assert time.perf_counter() - begin < FRAME_TIMEOUT_S + 4
        with_spare = await f.generate(f.relay, f.spare, salt="with spare")
    assert alone.tokens == with_spare.tokens == expected
    assert alone.num_shipped == (32 if num_messages == 5 else 0)
    assert with_spare.num_shipped == 119


async def test_a_queue_is_not_taken_for_a_dead_worker(folder: Path) -> None:
    """It is longer than the frame timeout; the passes before it show that there is progress."""
    slow = partial(time.sleep, 0.02)
    with (
        prefill_service(folder, before_block=slow, kv_tokens=1600, chunk_tokens=16) as (
            prefill,
            _,
        ),
        decode_service(folder, frame_timeout_s=FRAME_TIMEOUT_S) as (decode, worker),
    ):
        async with decode_client(decode.address, worker.kv_identity) as client:
            begin = time.perf_counter()
            long, short = await asyncio.gather(
                client.generate(make_prompt(1500), LEVEL, GREEDY, (prefill.address,)),
                client.generate(PROMPT, LEVEL, GREEDY, (prefill.address,)),
            )
            assert time.perf_counter() - begin > 2 * FRAME_TIMEOUT_S
            await eventually(client.is_idle, "all decode pages are free")
    assert (long.num_shipped, short.num_shipped) == (1499, 119)
    assert short.tokens == generate_alone(folder, PROMPT, [LEVEL] * 8)
