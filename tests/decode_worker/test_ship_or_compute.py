"""Real workers that choose, by what they measured, where a prompt is computed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from colm_serve.prefill_worker.worker import PrefillWorker
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


@dataclass
class Pair:
    """A prefill and a decode worker that have measured how fast they compute."""

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
        await eventually(lambda: self._is_running(len(calls)), "they have pages")
        yield
        self.gate.set()
        await asyncio.gather(*calls)

    async def _is_running(self, num_prompts: int) -> bool:
        return (await self.prefill.status()).num_running == num_prompts


@asynccontextmanager
async def pair(
    folder: Path, before_decode_block: Callable[[], object] | None = None
) -> AsyncIterator[Pair]:
    gate = threading.Event()
    gate.set()
    async with AsyncExitStack() as stack:
        p_service, p_worker = stack.enter_context(
            prefill_service(folder, before_block=lambda: gate.wait(60), kv_tokens=32768)
        )
        d_service, d_worker = stack.enter_context(
            decode_service(
                folder,
                before_block=before_decode_block,
                adaptive_prefill=True,
                frame_timeout_s=60.0,
            )
        )
        identity = d_worker.kv_identity
        d_client = await stack.enter_async_context(decode_client(d_service.address, identity))
        p_client = await stack.enter_async_context(
            prefill_client(p_service.address, identity, p_worker.layout)
        )
        await p_client.frames(p_client.request(make_prompt(500, seed=90)))
        await d_client.generate(make_prompt(500, seed=91), LEVEL, GREEDY)
        yield Pair(d_client, p_client, p_worker, gate)


async def test_a_prompt_is_computed_here_while_there_is_a_long_queue(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = make_prompt(600)
    async with pair(folder) as p:
        with caplog.at_level(logging.WARNING, "colm_serve.decode_worker.prompt_kv"):
            async with p.busy():
                got = await p.generate(prompt)
        assert not caplog.records, "the prefill worker was left, it did not fail"
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 0


async def test_what_a_busy_prefill_worker_has_cached_is_shipped_and_the_rest_computed_here(
    folder: Path,
) -> None:
    prompt = make_prompt(600)
    async with pair(folder) as p:
        await p.prefill.frames(p.prefill.request(prompt[:410]))
        async with p.busy():
            got = await p.generate(prompt)
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 400


async def test_a_slow_decode_worker_has_all_shipped(folder: Path) -> None:
    prompt = make_prompt(600)
    async with pair(folder, before_decode_block=lambda: time.sleep(0.05)) as p:
        got = await p.generate(prompt)
        assert p.prefill_worker.num_computed_tokens == 500 + 599
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    assert got.num_shipped == 599
