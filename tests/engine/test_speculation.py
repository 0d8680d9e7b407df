"""How much is drafted: the best number for an acceptance, a cost and a batch, 0 for a loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import StepCost
from colm_serve.engine.speculation import (
    AcceptanceRate,
    Candidate,
    DraftController,
    Load,
    expected_tokens,
    plan_drafts,
    speedup,
)

MAX_DRAFTS = 8
TOP = 4


def make_cost(draft_cost: float, row: float = 0.0, cached_token: float = 0.0) -> StepCost:
    """A step at the top level takes 1 s, one at level 1 `draft_cost`, further rows `row` each."""
    rest = (1 - draft_cost) / 3
    shares = (draft_cost, rest, rest, rest)
    return StepCost(
        shares,
        tuple(row * share for share in shares),
        (0.0,) * TOP,
        # Attention is alike at every level.
        (cached_token, 0.0, 0.0, 0.0),
    )


def plan(cost: StepCost, *candidates: Candidate, num_plain: int = 0) -> list[int]:
    load = Load(TOP)
    for candidate in candidates:
        load.add(candidate.level, candidate.num_cached)
    load.add(TOP, 0, num_plain)
    return plan_drafts(cost, 1, load, len(candidates) + num_plain, candidates)


def candidate(acceptance: float, num_cached: int = 0, level: int = TOP) -> Candidate:
    return Candidate(level, num_cached, acceptance, MAX_DRAFTS)


def test_the_formula() -> None:
    assert speedup(0.8, 4, 0.126) == pytest.approx((1 - 0.8**5) / (1 - 0.8) / (1 + 4 * 0.126))
    assert round(max(speedup(0.8, g, 0.126) for g in range(12)), 2) == 2.26
    assert round(max(speedup(0.8, g, 0.36) for g in range(12)), 2) == 1.42
    assert speedup(1.0, 3, 0.0) == 4
    assert speedup(0.5, 0, 0.9) == 1
    assert expected_tokens(0.0, 5) == 1


@given(st.floats(0, 1), st.floats(0.01, 0.9))
def test_a_request_alone_gets_the_formulas_best(acceptance: float, draft_cost: float) -> None:
    [num_drafts] = plan(make_cost(draft_cost), candidate(acceptance))
    best = max(speedup(acceptance, g, draft_cost) for g in range(MAX_DRAFTS + 1))
    got = speedup(acceptance, num_drafts, draft_cost)
    assert got == pytest.approx(best) or (num_drafts == 0 and best <= 1.03)


@pytest.mark.parametrize(("acceptance", "num_drafts"), [(0.3, 1), (0.6, 3), (0.8, 5), (0.95, 8)])
def test_more_is_drafted_the_likelier_it_is_accepted(acceptance: float, num_drafts: int) -> None:
    assert plan(make_cost(0.126), candidate(acceptance)) == [num_drafts]


def test_nothing_is_drafted_at_a_loss() -> None:
    cheap = candidate(0.8)
    assert plan(make_cost(0.126), cheap) > [0]
    assert plan(make_cost(0.85), cheap) == [0]
    assert plan(make_cost(0.126), candidate(0.1)) == [0]
    # The rows of a large batch cost as much as they yield.
    costly_rows = make_cost(0.126, row=0.9)
    assert plan(costly_rows, *[cheap] * 20) == [0] * 20
    # A draft attends to as many tokens as a step does.
    with_context = make_cost(0.126, cached_token=1e-3)
    assert plan(with_context, candidate(0.8, num_cached=100)) > [0]
    assert plan(with_context, candidate(0.8, num_cached=20_000)) == [0]


def test_each_request_of_a_batch_gets_its_own_number() -> None:
    cost = make_cost(0.126, row=0.05)
    numbers = plan(cost, candidate(0.3), candidate(0.95), candidate(0.7), candidate(0.0))
    assert numbers[1] > numbers[2] > numbers[0] >= numbers[3] == 0


def test_most_drafts_are_a_limit() -> None:
    cost = make_cost(0.01)
    assert plan(cost, Candidate(TOP, 0, 1.0, 3), Candidate(TOP, 0, 1.0, 0)) == [3, 0]
    assert plan(cost) == []


@given(
    st.lists(st.sampled_from([0.1, 0.4, 0.7, 0.9]), min_size=1, max_size=3),
    st.floats(0.05, 0.5),
    st.floats(0, 0.5),
    st.integers(0, 3),
)
def test_a_batch_makes_almost_as_many_tokens_as_with_any_numbers(
    acceptances: list[float], draft_cost: float, row: float, num_plain: int
) -> None:
    cost = make_cost(draft_cost, row)

    def speed(numbers: tuple[int, ...]) -> float:
        passes = [sum(n >= depth for n in numbers) for depth in range(1, max(numbers) + 1)]
        num_rows = len(numbers) + num_plain + sum(numbers)
        seconds = cost.step_s([num_rows] * TOP) + sum(cost.step_s([n]) for n in passes)
        tokens = sum(expected_tokens(a, n) for a, n in zip(acceptances, numbers, strict=True))
        return (tokens + num_plain) / seconds

    candidates = [Candidate(TOP, 0, acceptance, 4) for acceptance in acceptances]
    numbers = tuple(plan(cost, *candidates, num_plain=num_plain))
    best = max(map(speed, product(range(5), repeat=len(acceptances))))
    assert speed(numbers) >= 0.96 * best


def test_trials_are_the_drafts_up_to_the_first_rejected() -> None:
    rate = AcceptanceRate(prior=0.5)
    assert rate.value == 0.5
    for _ in range(500):
        rate.record(num_drafts=8, num_accepted=1)
    assert rate.value == pytest.approx(0.5, abs=0.02), "1 of 2, not 1 of 8"
    for _ in range(500):
        rate.record(num_drafts=2, num_accepted=2)
    assert rate.value > 0.99


@pytest.mark.parametrize("num_drafts", [1, 2, 8])
def test_the_rate_does_not_depend_on_how_many_are_drafted(num_drafts: int) -> None:
    accepts = keyed_coin(0.7)
    rate, values = AcceptanceRate(prior=0.2), []
    for _ in range(4000):
        rate.record(num_drafts, verify(num_drafts, accepts))
        values.append(rate.value)
    assert sum(values) / len(values) == pytest.approx(0.7, abs=0.03)


def keyed_coin(probability: float, seed: int = 3) -> Callable[[], bool]:
    generator = random.Random(seed)
    return lambda: generator.random() < probability


def verify(num_drafts: int, accepts: Callable[[], bool]) -> int:
    for num_accepted in range(num_drafts):
        if not accepts():
            return num_accepted
    return num_drafts


class Simulation:
    """A request's turns against drafts of which a share holds."""

    def __init__(self, draft_cost: float) -> None:
        self.cost = make_cost(draft_cost)
        self.controller = DraftController(TOP, prior=0.6)
        self.turn = 0

    def run(self, num_turns: int, acceptance: float) -> tuple[float, list[int]]:
        """Times plain decoding's speed, and what was drafted."""
        accepts = keyed_coin(acceptance)
        num_tokens, seconds, numbers = 0, 0.0, []
        for _ in range(num_turns):
            self.turn += 1
            proposed = self.controller.candidate(self.turn, 0, MAX_DRAFTS)
            [num_drafts] = plan(self.cost, proposed)
            self.controller.record_plan(self.turn, num_drafts)
            num_accepted = verify(num_drafts, accepts)
            if num_drafts:
                self.controller.record(num_drafts, num_accepted)
            numbers.append(num_drafts)
            num_tokens += 1 + num_accepted
            seconds += 1 + num_drafts * self.cost.step_s((1,))
        return num_tokens / seconds, numbers


@pytest.mark.parametrize("draft_cost", [0.126, 0.36])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_it_comes_close_to_the_best_that_is_possible(acceptance: float, draft_cost: float) -> None:
    speed, _ = Simulation(draft_cost).run(3000, acceptance)
    best = max(speedup(acceptance, g, draft_cost) for g in range(MAX_DRAFTS + 1))
    assert speed > 0.95 * best


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.7])
def test_what_does_not_pay_costs_next_to_nothing(acceptance: float) -> None:
    simulation = Simulation(draft_cost=0.7)
    speed, _ = simulation.run(1000, acceptance)
    assert speed > 0.98
    _, numbers = simulation.run(1000, acceptance)
    assert sum(numbers) <= 40, "it is tried too often"


def test_a_loss_at_any_acceptance_is_never_tried() -> None:
    _, numbers = Simulation(draft_cost=0.97).run(1000, 1.0)
    assert not any(numbers)


def test_it_recovers_when_drafts_begin_to_hold() -> None:
    simulation = Simulation(draft_cost=0.2)
    simulation.run(400, 0.05)
    _, numbers = simulation.run(2000, 0.9)
    assert min(numbers[-400:]) >= 2
    _, numbers = simulation.run(400, 0.02)
    assert sum(numbers[-200:]) <= 10


def test_requests_try_again_in_the_same_turns() -> None:
    controllers = [DraftController(TOP, prior=0.0) for _ in range(2)]
    for turn in range(1, 60):
        for controller in controllers[: 1 + (turn > 7)]:
            controller.record_plan(turn, 0)
    probes = [[t for t in range(60, 200) if c.is_probe(t)] for c in controllers]
    assert probes == [[64, 128, 192]] * 2
