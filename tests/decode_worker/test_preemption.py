"""Requests that outgrow the pool: whatever is preempted, no text changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_serve.core import Decoded, DecodeRequest
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.decode_worker.prefill_planner import PrefillPlanner
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.session import DecodeSession
from colm_serve.errors import ResourceExhausted, UnknownRequest
from colm_serve.transport.channel_cache import ChannelCache
from tests.helpers import (
    GREEDY,
    decode_service,
    generate_alone,
    make_prompt,
    prefill_service,
    with_tokens,
)
from tests.worker_clients import Generation, decode_client

#: Requests begin with a part of one of these, so prefixes are shared.
STEMS = [make_prompt(40, seed=seed) for seed in (1, 2, 3)]


@dataclass(frozen=True)
class Workload:
    """A random request, and the levels it is moved to after so many tokens."""

    prompt: tuple[int, ...]
    level: int
    max_tokens: int
    moves: dict[int, int]

    @classmethod
    def make(cls, random: Random) -> Workload:
        stem = random.choice(STEMS)[: random.choice([0, 16, 32])]
        max_tokens = random.randint(1, 60)
        return cls(
            prompt=stem + make_prompt(random.randint(1, 12), seed=random.randrange(4)),
            level=random.randint(1, 3),
            max_tokens=max_tokens,
            moves={random.randint(1, 60): random.randint(1, 3) for _ in range(2)},
        )

    async def run(self, make_session: Callable[[DecodeRequest], DecodeSession]) -> Generation:
        """Ask again for as long as there is no room."""
        sampling = with_tokens(GREEDY, self.max_tokens)
        while True:
            request = DecodeRequest("r", self.prompt, self.level, sampling, (), "")
            got, session = Generation(), make_session(request)
            try:
                async for event in session.events():
                    got.take(event)
                    if (level := self.moves.get(len(got.tokens))) is not None:
                        with suppress(UnknownRequest):  # It may be the last token.
                            session.move_level(level)
                return got
            except ResourceExhausted:
                await asyncio.sleep(0.01)


async def run_all(folder: Path, seed: int, num_requests: int, **config: Any) -> tuple[int, int]:
    """Run random requests at once and check each text; returns preemptions and prefix hits."""
    random = Random(seed)
    workloads = [Workload.make(random) for _ in range(num_requests)]
    with decode_service(folder, **config) as (_, worker):
        planner = PrefillPlanner(worker.local_load, worker.layout.num_layers)
        fetcher = PromptFetcher(
            worker.pool, worker.layout, "", ChannelCache(None), 1.0, "raw", planner
        )
        grammars = GrammarQueue(worker.grammars)

        def make_session(request: DecodeRequest) -> DecodeSession:
            request = replace(request, kv_identity=worker.kv_identity)
            return DecodeSession(worker, fetcher, grammars, request, 2048)

        clients = asyncio.Semaphore(12)

        async def run(workload: Workload) -> Generation:
            async with clients:
                return await workload.run(make_session)

        generations = await asyncio.gather(*map(run, workloads))
        num_preemptions = worker.status().num_preemptions
        fetcher.close()
    for workload, got in zip(workloads, generations, strict=True):
        assert len(got.tokens) == workload.max_tokens
        assert got.tokens == generate_alone(folder, workload.prompt, got.levels)
    return num_preemptions, sum(got.num_cached > 0 for got in generations)


async def test_many_requests_in_a_tiny_pool_get_their_texts(folder: Path) -> None:
    num_preemptions, num_hits = await run_all(
        folder, 7, 64, kv_tokens=256, expected_output_tokens=1, max_rows=6, max_batch_tokens=24
    )
    assert num_preemptions > 0
    assert num_hits > 0


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**16),
    num_pages=st.integers(7, 20),  # the largest request takes 7
    expected=st.sampled_from([1, 8, 64]),
    max_rows=st.integers(1, 6),
)
def test_no_combination_of_preemption_hits_and_moves_changes_a_text(
    folder: Path, seed: int, num_pages: int, expected: int, max_rows: int
) -> None:
    asyncio.run(
        run_all(
            folder, seed, 8, kv_tokens=16 * num_pages, expected_output_tokens=expected,
            max_rows=max_rows, max_batch_tokens=max_rows + 9,
        )
    )  # fmt: skip


async def test_long_texts_are_recomputed_by_the_prefill_worker(folder: Path) -> None:
    """Both streams go on to their ends; usage tells of the prompt alone."""
    prompts = [make_prompt(60, seed=seed) for seed in (8, 9)]
    with (
        prefill_service(folder) as (prefill, prefill_worker),
        decode_service(folder, kv_tokens=224, expected_output_tokens=4) as (service, worker),
    ):
        async with decode_client(service.address, worker.kv_identity) as client:
            sampling = with_tokens(GREEDY, 90)
            got = await asyncio.gather(
                *(client.generate(p, 2, sampling, (prefill.address,)) for p in prompts)
            )
            status = await client.status()
        num_computed = prefill_worker.num_computed_tokens
    assert status.num_preemptions > 0
    assert status.prefill_tokens_per_s == 0, "nothing was to be computed here"
    assert num_computed > 2 * 59, "the preempted one's text was computed again"
    for prompt, generation in zip(prompts, got, strict=True):
        assert isinstance(generation.end, Decoded)
        assert generation.num_shipped == 59
        assert generation.tokens == generate_alone(folder, prompt, [2] * 90)
