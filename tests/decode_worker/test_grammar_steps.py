"""A grammar's part of each token is nobody else's wait: held up, dear or failing, others go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, chain, count, repeat
from pathlib import Path
from typing import Any

import pytest

from colm_serve.core import SamplingParams
from colm_serve.engine import logits_processor
from colm_serve.engine.grammar import GrammarState
from colm_serve.engine.grammar_compiler import CompiledGrammar
from colm_serve.errors import InvalidArgument, RowFailed
from colm_serve.grammar import Grammar, GrammarKind
from tests.decode_worker.test_grammars import MODEL, PROMPT
from tests.helpers import decode_service, generate_alone, make_model_folder
from tests.router.cluster import save_tokenizer
from tests.worker_clients import decode_client, eventually

AMBIGUOUS = Grammar(GrammarKind.EBNF, "root ::= s\ns ::= s s s | s s | [a-z]", "mine")
RULED = SamplingParams(30, temperature=1.0, seed=5, grammar=AMBIGUOUS, ignore_eos=True)
NEIGHBOUR = SamplingParams(24, temperature=1.0, seed=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "with_tokenizer", MODEL)
    save_tokenizer(folder)
    return folder


def before_each_mask(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Have the library's matchers do something first when they are asked what comes next."""
    make = CompiledGrammar.new_matcher

    def new_matcher(compiled: CompiledGrammar) -> Any:
        matcher: Any = make(compiled)
        fill = matcher.fill_next_token_bitmask

        def fill_next(*arguments: Any) -> bool:
            first()
            return bool(fill(*arguments))

        matcher.fill_next_token_bitmask = fill_next
        return matcher

    monkeypatch.setattr(CompiledGrammar, "new_matcher", new_matcher)


async def test_nobody_waits_for_a_mask_that_does_not_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()
    num_asked = iter(range(1000))

    def wait_at_the_third() -> None:
        if next(num_asked) == 2:
            asked.set()
            go_on.wait(60)

    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            expected = (await client.generate(PROMPT, 3, RULED)).tokens
            before_each_mask(monkeypatch, wait_at_the_third)
            ruled = await client.open(client.request(PROMPT, 3, RULED))
            rest = asyncio.create_task(ruled.rest())
            await eventually(asked.is_set, "its third mask is asked for")
            neighbour = await client.generate(PROMPT, 2, NEIGHBOUR)
            assert neighbour.tokens == generate_alone(folder, PROMPT, [2] * 24, NEIGHBOUR)
            num_steps = worker.num_steps
            assert not go_on.is_set()
            assert not rest.done()
            assert len(ruled.got.tokens) <= 2
            go_on.set()
            assert (await rest).tokens == expected
            assert worker.num_steps >= num_steps + len(expected) - 2


async def test_who_waits_for_a_mask_can_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        go_on.wait(60)

    before_each_mask(monkeypatch, wait)
    try:
        with decode_service(folder) as (service, worker):
            async with decode_client(service.address, worker.kv_identity) as client:
                ruled = await client.open(client.request(PROMPT, 3, RULED))
                await eventually(asked.is_set, "its first mask is asked for")
                ruled.cancel()
                await eventually(client.is_idle, "it is gone")
                neighbour = await client.generate(PROMPT, 3, NEIGHBOUR)
                assert neighbour.tokens == generate_alone(folder, PROMPT, [3] * 24, NEIGHBOUR)
    finally:
        go_on.set()


def with_costs(
    monkeypatch: pytest.MonkeyPatch, make_costs_s: Callable[[], Iterator[float]]
) -> None:
    """Each thing that is timed for a request's grammar takes so long, as far as it is told."""

    def make_clock() -> Callable[[], float]:
        # What is timed has a beginning and an end.
        steps_s = chain.from_iterable((0.0, cost_s) for cost_s in make_costs_s())
        times_s = accumulate(steps_s)
        return lambda: next(times_s)

    monkeypatch.setattr(
        logits_processor,
        "GrammarState",
        lambda compiled, tokens, num_prompt: GrammarState(
            compiled, tokens, num_prompt, make_clock()
        ),
    )


async def test_an_ambiguous_grammar_fails_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like those of the real one: nothing at first, then more and more.
    with_costs(monkeypatch, lambda: (0.0005 * 1.25**i for i in count()))
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            running = asyncio.create_task(client.generate(PROMPT, 3, NEIGHBOUR))
            ruled = await client.open(client.request(PROMPT, 3, RULED))
            with pytest.raises(InvalidArgument, match="a less ambiguous grammar") as caught:
                await ruled.rest()
            assert caught.value.field == "mine"
            assert 5 < len(ruled.got.tokens) < 25
            assert (await running).tokens == generate_alone(folder, PROMPT, [3] * 24, NEIGHBOUR)
            worker.check_alive()


async def test_a_dear_grammar_has_the_same_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too dear for the step, and not so dear that it is given up."""
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            expected = (await client.generate(PROMPT, 3, RULED)).tokens
            with_costs(monkeypatch, lambda: repeat(0.005))
            results = await asyncio.gather(
                *(client.generate(PROMPT, 3, RULED) for _ in range(3)),
                client.generate(PROMPT, 3, replace(RULED, grammar=None)),
            )
            assert [result.tokens for result in results[:3]] == [expected] * 3


async def test_a_matcher_that_raises_fails_its_own_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("as told")

    before_each_mask(monkeypatch, fail)
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            running = asyncio.create_task(client.generate(PROMPT, 3, NEIGHBOUR))
            with pytest.raises(RowFailed, match="as told"):
                await client.generate(PROMPT, 3, RULED)
            assert (await running).tokens == generate_alone(folder, PROMPT, [3] * 24, NEIGHBOUR)
            worker.check_alive()
