from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.config import PlannerConfig
from colm_serve.core import PrefillCost, StepCost
from colm_serve.router.planner import Demand, Plan, WorkerCosts, make_plan

#: A level-1 step takes 10 ms and 1 ms a further row, each level above it as much again.
COSTS = WorkerCosts(
    prefill_cost=PrefillCost(0.0, 0.001, 0.0, chunk_tokens=512),
    step_cost=StepCost((0.010, 0.010, 0.010), (0.001, 0.001, 0.001)),
    max_rows=11,
    num_levels=3,
)
#: In full steps a worker makes 550 tokens/s at level 1, 183 at level 3.
BOUNDS = PlannerConfig(enabled=True, max_prefill=10, max_decode=10, hysteresis=0.25)
DEMAND = Demand(
    requests_per_s=1.0,
    prompt_tokens=200.0,
    computed_tokens=100.0,
    output_tokens=50.0,
    min_level=1,
    max_level=3,
)


def plan(*demands: Demand, prefill: int = 1, decode: int = 1, **changes: object) -> Plan:
    bounds = BOUNDS.model_copy(update=changes)
    return make_plan(demands, COSTS, bounds, prefill, decode)


def at(requests_per_s: float, **changes: object) -> Demand:
    return replace(DEMAND, requests_per_s=requests_per_s, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("demand", "num_prefill", "num_decode", "level_share"),
    [
        pytest.param(at(0), 1, 1, (0, 0, 0), id="nobody asks"),
        pytest.param(at(2), 1, 1, (0, 0, 1), id="little"),
        # 100 requests x 100 tokens/s are 10 workers' work; at 80% that takes more than allowed.
        pytest.param(at(100), 10, 10, (1, 0, 0), id="more than the lowest level can make"),
        # 20 x 100 tokens/s: 2 workers' work; 20 x 50 tokens/s: 5.45 workers' at level 3.
        pytest.param(at(20), 3, 7, (0, 0, 1), id="as many as the highest level takes"),
        # 40 x 50 tokens/s are 10.9 workers' work at level 3, 7.3 at level 2: there are 8.
        pytest.param(at(40), 5, 10, (0, 0.8, 0.2), id="levels mixed to fill all workers"),
        pytest.param(at(40, min_level=3), 5, 10, (0, 0, 1), id="bounds hold"),
        pytest.param(at(40, max_level=1), 5, 5, (1, 0, 0), id="only level 1 is asked for"),
        # 0.02 s allow for 11 rows at level 1, 1 at level 2, none at level 3.
        pytest.param(at(2, tpot_s=0.020), 1, 10, (0, 1, 0), id="a target no count keeps at 3"),
        pytest.param(at(2, tpot_s=0.001), 1, 10, (1, 0, 0), id="a target that none keeps"),
        # A prompt takes 0.1 s, and with 10 requests/s on n workers waits 0.05 / (n - 1).
        pytest.param(at(10, ttft_s=0.105), 10, 4, (0, 0, 1), id="queues short enough"),
        pytest.param(at(10, ttft_s=0.12), 4, 4, (0, 0, 1), id="queues that may be longer"),
        pytest.param(at(10, ttft_s=0.05), 2, 4, (0, 0, 1), id="late even when idle"),
    ],
)
def test_counts_and_levels(
    demand: Demand, num_prefill: int, num_decode: int, level_share: tuple[float, ...]
) -> None:
    made = plan(demand)
    assert (made.num_prefill, made.num_decode) == (num_prefill, num_decode)
    assert made.level_share == pytest.approx(level_share, abs=0.01)


def test_classes_add_up_each_at_its_own_levels() -> None:
    made = plan(at(10, max_level=1), at(10))
    assert made.num_decode == 5, "0.9 and 2.7 workers' work"
    assert made.level_share == (0.5, 0, 0.5)


def test_longer_contexts_cost_what_attention_does() -> None:
    step_cost = replace(COSTS.step_cost, cached_token_s=(1e-5, 1e-5, 1e-5))
    costs = replace(COSTS, step_cost=step_cost)
    made = make_plan([at(10, prompt_tokens=400.0)], costs, BOUNDS, 1, 1)
    assert made.num_decode > plan(at(10)).num_decode


def test_what_has_not_been_measured_asks_for_no_worker() -> None:
    costs = replace(COSTS, prefill_cost=PrefillCost(0.0, 0.0, 0.0, chunk_tokens=512))
    assert make_plan([at(100)], costs, BOUNDS, 1, 1).num_prefill == 1


def test_the_decision_is_explained_in_one_line() -> None:
    made = plan(at(40))
    assert made.reason == (
        "40 requests/s bring 4000 prompt tokens/s, work for 4.00 prefill workers, and 2000 output "
        "tokens/s, at the highest levels work for 10.91 decode workers: 5 prefill and 10 decode "
        "workers, levels: 80% at 2, 20% at 3"
    )


@pytest.mark.parametrize(
    ("requests_per_s", "current", "expected"),
    [
        (20, 4, 7),  # needed now
        (20, 8, 8),  # 25% more would take 9
        (20, 9, 9),
        (20, 10, 9),
    ],
)
def test_workers_go_only_when_more_load_would_not_call_them_back(
    requests_per_s: float, current: int, expected: int
) -> None:
    assert plan(at(requests_per_s), decode=current).num_decode == expected


rates = st.floats(0, 200)
counts = st.integers(1, 10)
demands = st.builds(
    lambda rate, prompt, cached, output, levels, ttft_s, tpot_s: Demand(
        requests_per_s=rate,
        prompt_tokens=prompt,
        computed_tokens=prompt * (1 - cached),
        output_tokens=output,
        min_level=min(levels),
        max_level=max(levels),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    ),
    rates,
    st.floats(1, 4000),
    st.floats(0, 1),
    st.floats(0, 1000),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.none() | st.floats(0.001, 10),
    st.none() | st.floats(0.001, 0.2),
)
many_demands = st.lists(demands, max_size=3)
bounds = st.builds(
    lambda prefill, decode: BOUNDS.model_copy(
        update={
            "min_prefill": min(prefill),
            "max_prefill": max(prefill),
            "min_decode": min(decode),
            "max_decode": max(decode),
        }
    ),
    st.tuples(counts, counts),
    st.tuples(counts, counts),
)


def scaled(demands: list[Demand], factor: float) -> list[Demand]:
    return [replace(d, requests_per_s=d.requests_per_s * factor) for d in demands]


def mean_level(made: Plan) -> float:
    return sum(level * share for level, share in enumerate(made.level_share, 1))


@given(many_demands, bounds, counts, counts)
def test_plans_stay_within_their_bounds(
    demands: list[Demand], bounds: PlannerConfig, prefill: int, decode: int
) -> None:
    made = make_plan(demands, COSTS, bounds, prefill, decode)
    assert bounds.min_prefill <= made.num_prefill <= bounds.max_prefill
    assert bounds.min_decode <= made.num_decode <= bounds.max_decode
    assert sum(made.level_share) == pytest.approx(1) or not any(d.tokens_per_s for d in demands)
    asked = [d for d in demands if d.tokens_per_s]
    for level, share in enumerate(made.level_share, 1):
        assert share == 0 or any(d.min_level <= level <= d.max_level for d in asked)


@given(many_demands, bounds, st.floats(1, 10), counts, counts)
def test_more_load_never_means_fewer_workers_or_higher_levels(
    demands: list[Demand], bounds: PlannerConfig, factor: float, prefill: int, decode: int
) -> None:
    less = make_plan(demands, COSTS, bounds, prefill, decode)
    more = make_plan(scaled(demands, factor), COSTS, bounds, prefill, decode)
    assert more.num_prefill >= less.num_prefill
    assert more.num_decode >= less.num_decode
    if more.num_decode == less.num_decode:
        assert mean_level(more) <= mean_level(less) + 1e-6


@given(many_demands, bounds, st.lists(st.floats(1, 1.24), min_size=2, max_size=8), counts, counts)
def test_a_load_that_varies_within_the_hysteresis_does_not_flap(
    demands: list[Demand],
    bounds: PlannerConfig,
    factors: list[float],
    prefill: int,
    decode: int,
) -> None:
    """Workers that were added are not taken away again."""
    history = [(prefill, decode)]
    for factor in factors:
        made = make_plan(scaled(demands, factor), COSTS, bounds, *history[-1])
        history.append((made.num_prefill, made.num_decode))
    history = history[1:]  # the first may have been outside the bounds
    for counts_of_a_kind in zip(*history, strict=True):
        changes = [b - a for a, b in pairwise(counts_of_a_kind) if b != a]
        assert all(before < 0 or after > 0 for before, after in pairwise(changes))
