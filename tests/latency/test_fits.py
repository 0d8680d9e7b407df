"""Costs fitted to steps and passes predict those that follow."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from colm_serve.core import PrefillCost, StepCost
from colm_serve.latency.prefill_fit import PrefillFit
from colm_serve.latency.step_fit import StepFit

MEASURED = StepCost(
    chain_s=(0.004, 0.002, 0.003),
    row_s=(0.0002, 0.0001, 0.0),
    wide_row_s=(0.0001, 0.0001, 0.0001),
    cached_token_s=(1e-7, 1e-7, 1e-7),
)
TRUE = StepCost(
    chain_s=(0.008, 0.003, 0.006),
    row_s=(0.0003, 0.0003, 0.0001),
    wide_row_s=(0.0002, 0.0002, 0.0002),
    cached_token_s=(5e-7, 5e-7, 5e-7),
)


def batches(seed: int, number: int) -> list[list[tuple[int, int]]]:
    """Of each row its level, and the tokens that it attends to."""
    draw = random.Random(seed)
    return [
        [(draw.randint(1, 3), draw.randint(1, 4000)) for _ in range(draw.randint(1, 24))]
        for _ in range(number)
    ]


def per_chain(rows: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    uses = [[cached for level, cached in rows if level > chain] for chain in range(3)]
    return [len(use) for use in uses], [sum(use) for use in uses]


def test_a_step_cost_follows_the_steps() -> None:
    fit = StepFit(MEASURED)
    assert fit.cost == MEASURED
    for rows in batches(1, 1000):
        fit.observe(*per_chain(rows), TRUE.step_s(*per_chain(rows)))
    for rows in batches(2, 50):
        seconds = TRUE.step_s(*per_chain(rows))
        assert fit.cost.step_s(*per_chain(rows)) == pytest.approx(seconds, rel=0.1)


def test_a_cost_that_was_not_measured_stays_so() -> None:
    fit = StepFit(StepCost((), ()))
    fit.observe((), (), 0.1)
    assert fit.cost == StepCost((), ())


def test_a_prefill_cost_follows_the_passes() -> None:
    true = PrefillCost(pass_s=0.003, token_s=0.0002, attended_key_s=3e-8, chunk_tokens=256)
    measured = PrefillCost(pass_s=0.001, token_s=0.0003, attended_key_s=0.0, chunk_tokens=256)
    fit, draw = PrefillFit(measured), random.Random(3)
    for _ in range(1000):
        starts = [draw.randrange(8000) for _ in range(draw.randint(1, 3))]
        chunks = [(start, start + draw.randint(1, 256)) for start in starts]
        num_tokens = sum(stop - start for start, stop in chunks)
        num_keys = sum(p + 1 for start, stop in chunks for p in range(start, stop))
        fit.observe(chunks, 0.003 + 0.0002 * num_tokens + 3e-8 * num_keys)
    for start, stop in ((0, 100), (0, 8000), (4000, 8000)):
        assert fit.cost.seconds(start, stop) == pytest.approx(true.seconds(start, stop), rel=0.1)
    assert fit.cost.chunk_tokens == 256


def test_a_prompt_takes_passes_tokens_and_keys() -> None:
    cost = PrefillCost(pass_s=1.0, token_s=0.1, attended_key_s=0.01, chunk_tokens=4)
    assert cost.seconds(0, 10) == pytest.approx(3 * 1.0 + 10 * 0.1 + 55 * 0.01)
    assert cost.seconds(8, 10) == pytest.approx(1.0 + 2 * 0.1 + (9 + 10) * 0.01)
    assert cost.seconds(10, 10) == 0
    assert replace(cost, chunk_tokens=100).seconds(0, 10) == pytest.approx(1 + 1 + 0.55)
