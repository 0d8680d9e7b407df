"""Whatever goes wrong for one request ends that request: the others' texts stay what they are."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.decode_worker import worker as worker_module
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine import sampler
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.step import Scores, Segment, run_pass
from colm_serve.errors import InvalidArgument, RowFailed, Unavailable
from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.serving import ServingModel
from tests.decode_worker.test_service import cluster
from tests.helpers import GREEDY, TINY, decode_service, generate_alone, make_prompt, with_tokens
from tests.worker_clients import DecodeClient, DecodeStream, decode_client, eventually

#: A token that no test's neighbours have; see `poisoned`.
POISON = 96
PROMPT = tuple(token for token in make_prompt(60, seed=8) if token != POISON)[:40]
NEIGHBOUR = with_tokens(GREEDY, 40)
#: What marks the one request of a test whose rules or draws are to fail.
MARKED = SamplingParams(8, temperature=1.0, seed=666, presence_penalty=1.5)


@dataclass
class Bench:
    """A real worker that serves, and a client of it."""

    decode: DecodeClient
    worker: DecodeWorker
    folder: Path

    async def neighbour(self) -> DecodeStream:
        """A request under way, one token of it made."""
        stream = await self.decode.open(self.decode.request(PROMPT, 2, NEIGHBOUR))
        await stream.tokens(1)
        return stream

    async def check(self, neighbour: DecodeStream, num_failed: int = 1) -> None:
        """The neighbour's text is its own, and so is that of who comes after."""
        expected = generate_alone(self.folder, PROMPT, [2] * 40, NEIGHBOUR)
        assert POISON not in expected
        assert (await neighbour.rest()).tokens == expected
        after = await self.decode.generate(PROMPT[:20], 3)
        assert after.tokens == generate_alone(self.folder, PROMPT[:20], [3] * 8)
        self.worker.check_alive()
        await eventually(self.decode.is_idle, "all decode pages are free")
        assert (await self.decode.status()).num_failed_rows == num_failed


@asynccontextmanager
async def bench(folder: Path, **changes: Any) -> AsyncIterator[Bench]:
    with decode_service(folder, **changes) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            yield Bench(client, worker, folder)


def poisoned(worker: DecodeWorker) -> None:
    """Let the worker's model be no number at all wherever a text has `POISON`."""
    assert isinstance(worker._model, CpuModel)
    for table in worker._model._embeddings:
        table[POISON] = math.nan


def scores_of_level(
    monkeypatch: pytest.MonkeyPatch, level: int, change: Callable[[Tensor], Tensor]
) -> None:
    """Change the scores that a worker's passes give rows of this level; its self-test passes."""

    def run(model: ServingModel, pool: KvPool, segments: list[Segment]) -> Scores:
        scores = run_pass(model, pool, segments)
        levels = torch.tensor([s.level for s in segments for _ in range(s.num_scored)])
        is_changed = (levels == level)[:, None]
        changed_SV = torch.where(is_changed, change(scores.logits_SV), scores.logits_SV)
        return Scores(changed_SV, scores.x_SD)

    monkeypatch.setattr(worker_module, "run_pass", run)


POISONED: dict[str, tuple[tuple[int, ...], SamplingParams]] = {
    "as the last token": ((*PROMPT, POISON), GREEDY),
    "amid the prompt": ((*PROMPT[:20], POISON, *PROMPT[20:]), GREEDY),
    "as the first token": ((POISON, *PROMPT), GREEDY),
    "drawn": ((*PROMPT, POISON), replace(GREEDY, temperature=0.9)),
    "drawn with top_p": ((*PROMPT, POISON), replace(GREEDY, temperature=0.9, top_p=0.9)),
    "with rules": ((*PROMPT, POISON), replace(GREEDY, repetition_penalty=1.2, min_tokens=3)),
    "scored": ((*PROMPT[:20], POISON, *PROMPT[20:]), replace(GREEDY, prompt_logprobs=2)),
    "with logprobs": ((*PROMPT, POISON), replace(GREEDY, logprobs=2)),
}


@pytest.mark.parametrize(("prompt", "sampling"), POISONED.values(), ids=POISONED)
async def test_a_text_at_which_the_model_is_no_number_fails_alone(
    folder: Path, prompt: tuple[int, ...], sampling: SamplingParams
) -> None:
    async with bench(folder) as b:
        poisoned(b.worker)
        neighbour = await b.neighbour()
        with pytest.raises(RowFailed, match="not all numbers"):
            await b.decode.generate(prompt, 3, sampling)
        await b.check(neighbour)


@pytest.mark.parametrize("speculation", [False, True], ids=["", "drafted"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one token", "all tokens"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.8, "top_p": 0.5}, {"temperature": 1.0, "logit_bias": ((3, 9),)}],
)
async def test_scores_that_are_no_numbers_end_their_own_request(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    where: str,
    value: float,
    speculation: bool,
) -> None:
    def change(logits_SV: Tensor) -> Tensor:
        changed_SV = logits_SV.clone()
        changed_SV[:, slice(5, 6) if where == "one token" else slice(None)] = value
        return changed_SV

    scores_of_level(monkeypatch, 3, change)
    async with bench(folder, speculation={"enabled": speculation, "sampled": True}) as b:
        stream = await b.decode.open(b.decode.request(PROMPT, 2, NEIGHBOUR))
        request = b.decode.generate(PROMPT[:9], 3, replace(GREEDY, **fields))
        if where == "one token" and value == -math.inf:
            assert 5 not in (await request).tokens, "that rules a token out, and no more"
            return
        with pytest.raises(RowFailed, match="not all numbers"):
            await request
        expected = generate_alone(folder, PROMPT, [2] * 40, NEIGHBOUR)
        assert (await stream.rest()).tokens == expected
        b.worker.check_alive()
        assert b.worker.status().num_failed_rows == 1


async def test_an_infinite_penalised_score_ends_its_own_request(folder: Path) -> None:
    """A value that no router lets through, and that killed the worker."""
    async with bench(folder) as b:
        neighbour = await b.neighbour()
        for fields in ({}, {"top_p": 0.9}, {"temperature": 0}):
            request = b.decode.request(PROMPT[:9], 3, replace(MARKED, **fields))
            with pytest.raises(InvalidArgument, match="repetition_penalty: 1e-38 is not allowed"):
                await generate_with(b.decode, request, repetition_penalty=1e-38)
        await b.check(neighbour, num_failed=0)


async def generate_with(client: DecodeClient, request: DecodeRequest, **fields: float) -> None:
    """Send sampling fields past the checks of our own side."""
    before = {name: getattr(request.sampling, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(request.sampling, name, value)
    try:
        await (await client.open(request)).rest()
    finally:
        for name, value in before.items():
            object.__setattr__(request.sampling, name, value)


async def test_rules_that_leave_no_finite_score_end_their_own_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(folder) as b:
        for value in (math.nan, math.inf, -math.inf):
            with monkeypatch.context() as patched:
                patched.setattr(
                    LogitsProcessor,
                    "process",
                    lambda self, logits_V, drafts=(), value=value: torch.full_like(logits_V, value),
                )
                neighbour = await b.neighbour()
                for temperature in (0, 1.0):
                    sampling = replace(MARKED, temperature=temperature)
                    with pytest.raises(RowFailed, match="sampling rules leave no score"):
                        await b.decode.generate(PROMPT[:9], 3, sampling)
                await neighbour.rest()
        await b.check(await b.neighbour(), num_failed=6)


@pytest.mark.parametrize("speculation", [False, True], ids=["", "drafted"])
async def test_rules_that_raise_end_their_own_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, speculation: bool
) -> None:
    num_calls = 0

    def process(self: LogitsProcessor, logits_V: Tensor, drafts: Any = ()) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise ZeroDivisionError("a rule that cannot be")
        return logits_V

    monkeypatch.setattr(LogitsProcessor, "process", process)
    async with bench(folder, speculation={"enabled": speculation, "sampled": True}) as b:
        neighbour = await b.neighbour()
        stream = await b.decode.open(b.decode.request(PROMPT[:9], 3, MARKED))
        with pytest.raises(RowFailed, match="ZeroDivisionError: a rule that cannot be"):
            await stream.rest()
        await b.check(neighbour)


@pytest.mark.parametrize("token", [TINY.vocab_size, -1, 2**40])
async def test_a_token_outside_the_vocabulary_ends_its_own_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    monkeypatch.setattr(sampler, "draw", lambda *arguments: token)
    async with bench(folder) as b:
        neighbour = await b.neighbour()
        with pytest.raises(RowFailed, match=f"token {token} was chosen of a vocabulary of 97"):
            await b.decode.generate(PROMPT[:9], 3, MARKED)
        await b.check(neighbour)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(30, 3), (1, 1)], ids=["prompt", "row"])
async def test_a_turn_that_cannot_be_composed_for_one_request_ends_that_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_pages: int
) -> None:
    table = KvPool.table

    def fails(self: KvPool, pages: tuple[int, ...]) -> BlockTable:
        if len(pages) == num_pages:
            raise MemoryError("no room for a table")
        return table(self, pages)

    async with bench(folder, expected_output_tokens=16) as b:
        neighbour = await b.neighbour()
        with monkeypatch.context() as patched:
            patched.setattr(KvPool, "table", fails)
            with pytest.raises(RowFailed, match="MemoryError: no room for a table"):
                await b.decode.generate(make_prompt(num_tokens), 3)
            await neighbour.rest()
        await b.check(await b.neighbour())


async def test_rules_that_cannot_be_made_keep_no_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(folder, kv_tokens=256) as b:
        with monkeypatch.context() as patched:
            patched.setattr(LogitsProcessor, "__init__", lambda *arguments: 1 // 0)
            for _ in range(100):  # Those of a few would fill the pool.
                with pytest.raises(RowFailed, match="ZeroDivisionError"):
                    await b.decode.generate(PROMPT, 3, MARKED)
        await eventually(b.decode.is_idle, "all decode pages are free")
        await b.check(await b.neighbour(), num_failed=100)


#: Two blocks of 16 tokens, and one more for their K and V to be cached.
SHARED = (*PROMPT[:32], 5)


async def test_blocks_of_a_prompt_without_numbers_are_not_found(folder: Path) -> None:
    prompt = (POISON, *PROMPT)
    async with bench(folder) as b:
        poisoned(b.worker)
        for _ in range(2):
            stream = await b.decode.open(b.decode.request(prompt, 3))
            with pytest.raises(RowFailed):
                await stream.rest()
            assert stream.got.num_cached == 0


async def test_blocks_that_were_found_damaged_are_not_found_again(
    folder: Path,
) -> None:
    expected = generate_alone(folder, SHARED, [3] * 8)
    async with bench(folder) as b:
        assert (await b.decode.generate(SHARED, 3)).tokens == expected
        assert (await b.decode.generate(SHARED, 3)).num_cached == 32
        # Keys and values of the first layer are damaged where they lie, in every page.
        b.worker.pool._slots[0] = math.nan
        hit = await b.decode.open(b.decode.request(SHARED, 3))
        with pytest.raises(RowFailed):
            await hit.rest()
        assert hit.got.num_cached == 32
        for num_cached in (0, 32):
            again = await b.decode.generate(SHARED, 3)
            assert (again.num_cached, again.tokens) == (num_cached, expected)
        await b.check(await b.neighbour())


async def test_a_request_that_breaks_its_rules_leaves_its_prompt_to_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(folder) as b:
        with monkeypatch.context() as patched:
            patched.setattr(LogitsProcessor, "process", lambda *arguments: 1 // 0)
            with pytest.raises(RowFailed):
                await b.decode.generate(SHARED, 3, MARKED)
        again = await b.decode.generate(SHARED, 3)
        assert again.num_cached == 32
        assert again.tokens == generate_alone(folder, SHARED, [3] * 8)


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("damage", ["layers", "head"])
async def test_a_worker_whose_model_is_no_number_takes_itself_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str, num_requests: int
) -> None:
    """Its requests hear what those of a dead worker hear, so routers bring them to another one."""

    async def run() -> None:
        async with bench(folder) as b:
            streams = [await b.neighbour() for _ in range(num_requests)]
            model = b.worker._model
            assert isinstance(model, CpuModel)
            if damage == "head":
                head = model.logits
                monkeypatch.setattr(model, "logits", lambda *arguments: head(*arguments) * math.nan)
            else:
                model._layers.arrays.gains_LED[-1] = math.nan
            for stream in streams:
                with pytest.raises(Unavailable, match="not all numbers, whatever the text"):
                    await stream.rest()
            with pytest.raises(Unavailable):
                b.worker.check_alive()
            with pytest.raises(Unavailable):
                await b.decode.generate(PROMPT, 1)

    # It broke in the midst of a pass, whose pages are never given back.
    with pytest.raises(AssertionError, match="pages were not given back"):
        await run()


async def test_damaged_blocks_of_a_prefill_worker_change_no_text(folder: Path) -> None:
    """It notices as it computes on from them; the decode worker computes the prompt itself."""
    first, longer = make_prompt(100, seed=8), make_prompt(300, seed=8)
    assert longer[:100] == first
    async with cluster(folder) as c:
        await c.decode.generate(first, 3, GREEDY, c.prefill)
        c.prefill_worker.pool._slots[0] = math.nan
        got = await c.decode.generate(longer, 3, replace(GREEDY, seed=1), c.prefill)
        assert got.tokens == generate_alone(folder, longer, [3] * 8)
        c.prefill_worker.check_alive()
