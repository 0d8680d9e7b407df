"""Costs fitted to steps and passes predict those that follow."""

from __future__ import annotations

import random
import statistics
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


#: Of each chain, the rows that use it and the tokens that they attend to.
Load = tuple[list[int], list[int]]


def per_chain(rows: list[tuple[int, int]], num_chains: int = 3) -> Load:
    uses = [[cached for level, cached in rows if level > chain] for chain in range(num_chains)]
    return [len(use) for use in uses], [sum(use) for use in uses]


def test_a_step_cost_follows_the_steps() -> None:
    fit = StepFit(MEASURED)
    assert fit.cost == MEASURED
    for rows in batches(1, 1000):
        fit.observe(*per_chain(rows), TRUE.step_s(*per_chain(rows)))
    for rows in batches(2, 50):
        seconds = TRUE.step_s(*per_chain(rows))
        assert fit.cost.step_s(*per_chain(rows)) == pytest.approx(seconds, rel=0.1)


#: What a worker of the bundled model measures at its start, noise and all.
AT_START = StepCost(
    chain_s=(288e-6, 0.0, 82e-6, 37e-6),
    row_s=(13e-6, 18e-6, 12e-6, 32e-6),
    wide_row_s=(7e-6, 0.0, 4e-6, 0.0),
    cached_token_s=(94e-9, 125e-9, 51e-9, 175e-9),
)
#: What its steps take among other processes: more for each, for each row and for each chain.
UNDER_LOAD = StepCost(
    chain_s=(1300e-6, 60e-6, 160e-6, 100e-6),
    row_s=(110e-6, 20e-6, 15e-6, 30e-6),
    wide_row_s=(10e-6, 4e-6, 4e-6, 4e-6),
    cached_token_s=(150e-9, 150e-9, 100e-9, 200e-9),
)


def bursts(draw: random.Random, level: int, num_steps: int, others: float) -> list[Load]:
    """Batches of 1 to 32 rows that last a while, of which a share is at other levels."""
    steps: list[Load] = []
    while len(steps) < num_steps:
        num_rows = min(32, 1 + int(draw.expovariate(0.2)))
        levels = [draw.randint(2, 4) if draw.random() < others else level for _ in range(num_rows)]
        lengths = [draw.randint(50, 700) for _ in range(num_rows)]
        for step in range(draw.randint(5, 40)):
            rows = [(k, length + step) for k, length in zip(levels, lengths, strict=True)]
            steps.append(per_chain(rows, num_chains=4))
    return steps[:num_steps]


def noise(draw: random.Random) -> float:
    """Right-skewed, with a pause now and then."""
    pause = draw.uniform(5, 20) if draw.random() < 0.03 else 1.0
    return draw.lognormvariate(0.0, 0.3) * pause


@pytest.mark.parametrize("slower", [1.0, 2.5, 0.5])
def test_a_step_cost_does_not_drift_under_load(slower: float) -> None:
    """Steps at one level say little of the chains one by one: they must share what is seen."""
    fit, draw = StepFit(AT_START), random.Random(4)

    def true_s(load: Load) -> float:
        return slower * UNDER_LOAD.step_s(*load)

    def predicted_over_true(level: int) -> float:
        ahead = bursts(random.Random(5), level, 300, others=0.0)
        return statistics.median(fit.cost.step_s(*load) / true_s(load) for load in ahead)

    for level, others in ((4, 0.0), (4, 0.05), (2, 0.05), (1, 0.0), (4, 0.0)):
        for _ in range(4):
            for load in bursts(draw, level, 400, others):
                fit.observe(*load, true_s(load) * noise(draw))
            assert predicted_over_true(level) == pytest.approx(1.0, abs=0.15)
            for other in range(1, 5):
                assert 0.5 < predicted_over_true(other) < 2.0


def test_bursts_that_slow_the_machine_down_leave_the_levels_apart() -> None:
    """More rows come with other processes' work; no chain is thought to be free for that."""
    fit, draw = StepFit(AT_START), random.Random(7)
    for load in bursts(draw, 4, 4000, others=0.3):
        slower = 1 + load[0][0] / 4
        fit.observe(*load, slower * UNDER_LOAD.step_s(*load) * noise(draw))
        first_s, now_s = AT_START.chain_s, fit.cost.chain_s
        assert all(now > first / 2 for now, first in zip(now_s, first_s, strict=True) if first)


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


def test_a_prefill_cost_does_not_drift_under_load() -> None:
    """Passes over short prompts say little of keys, those over whole chunks little of passes."""
    measured = PrefillCost(pass_s=5e-4, token_s=8e-6, attended_key_s=2e-8, chunk_tokens=512)
    true = PrefillCost(pass_s=1.5e-3, token_s=25e-6, attended_key_s=4e-8, chunk_tokens=512)
    fit, draw = PrefillFit(measured), random.Random(6)

    def predicted_over_true(num_tokens: int) -> float:
        return fit.cost.seconds(0, num_tokens) / true.seconds(0, num_tokens)

    for longest in (150, 4000, 60):
        for _ in range(1000):
            num_tokens = draw.randint(20, longest)
            start = draw.randrange(0, num_tokens, 512)
            stop = min(num_tokens, start + 512)
            fit.observe([(start, stop)], true.seconds(start, stop) * noise(draw))
        assert predicted_over_true(longest) == pytest.approx(1.0, abs=0.15)
        for num_tokens in (1, 100, 1000, 4000):
            assert 0.5 < predicted_over_true(num_tokens) < 2.0


def test_a_prompt_takes_passes_tokens_and_keys() -> None:
    cost = PrefillCost(pass_s=1.0, token_s=0.1, attended_key_s=0.01, chunk_tokens=4)
    assert cost.seconds(0, 10) == pytest.approx(3 * 1.0 + 10 * 0.1 + 55 * 0.01)
    assert cost.seconds(8, 10) == pytest.approx(1.0 + 2 * 0.1 + (9 + 10) * 0.01)
    assert cost.seconds(10, 10) == 0
    assert replace(cost, chunk_tokens=100).seconds(0, 10) == pytest.approx(1 + 1 + 0.55)
