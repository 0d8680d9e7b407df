"""Whole simulations: nothing is lost, equal seeds are equal, and latencies add up."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from colm_serve.errors import InvalidConfig
from colm_serve.router.placing.outlook import Outlook
from colm_serve.simulate.command import with_policy
from colm_serve.simulate.simulation import Simulation
from colm_serve.simulate.synthetic import SyntheticTrace
from colm_serve.simulate.trace import Trace
from tests.simulate.clusters import COSTS, cluster_config


def bursty(num_requests: int = 400, rate_per_s: float = 30, seed: int = 0) -> SyntheticTrace:
    return SyntheticTrace.model_validate(
        {
            "num_requests": num_requests,
            "seed": seed,
            "arrivals": {"kind": "bursty", "rate_per_s": rate_per_s},
            "kinds": [
                {"weight": 2, "sla_class": "interactive", "prompt": {"mean": 60, "max": 400}},
                {"prompt": {"mean": 200}, "output": {"mean": 100, "max": 400}},
            ],
            "conversations": {"mean_turns": 2, "num_shared_prefixes": 3, "mean_pause_s": 2},
        }
    )


@pytest.mark.parametrize("rate_per_s", [5, 100])
@pytest.mark.parametrize("decode", [{}, {"kv_tokens": 2048, "expected_output_tokens": 16}])
def test_every_request_ends_once_and_every_page_comes_back(
    rate_per_s: float, decode: dict[str, int]
) -> None:
    config = cluster_config(decode={"count": 2, "max_rows": 8, "kv_tokens": 8192, **decode})
    simulation = Simulation(config, COSTS)
    outcome = simulation.run(bursty(rate_per_s=rate_per_s))
    simulation.check_integrity()
    assert outcome.total.num_requests == 400
    finished = sum(len(c.ttft_ms) for c in outcome.classes.values())
    assert finished + outcome.total.num_refused + outcome.total.num_late == 400
    assert finished > 20
    num_tokens = sum(c.num_tokens for c in outcome.classes.values())
    # Some tokens were made for requests that were then past their deadline.
    assert num_tokens <= sum(outcome.tokens_by_level)
    assert outcome.total.num_late or num_tokens == sum(outcome.tokens_by_level)


def test_equal_seeds_give_equal_outcomes() -> None:
    def run(seed: int) -> object:
        return Simulation(cluster_config(), COSTS).run(bursty(seed=seed)).as_json()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_run_leaves_no_cycles_behind() -> None:
    """Nobody looks for them as long as it lasts."""
    simulation, trace = Simulation(cluster_config(), COSTS), bursty(rate_per_s=100)
    gc.collect()
    outcome = simulation.run(trace)
    assert gc.collect() == 0
    assert outcome.total.num_refused


def lone(prompt: int, output: int) -> Trace:
    lengths = {"prompt": {"mean": prompt, "spread": 0}, "output": {"mean": output, "spread": 0}}
    return SyntheticTrace.model_validate({"num_requests": 1, "kinds": [lengths]})


def test_a_lone_request_takes_the_sum_of_its_parts() -> None:
    outcome = Simulation(cluster_config(), COSTS).run(lone(101, 3))
    # At level 3: every chain's weights, and each chain's attention to all the tokens so far.
    steps_s = [0.008 + 3e-6 * (101 + made) for made in range(3)]
    # All but the last token of the prompt; the n-th attends to n keys.
    prefill_s = 0.001 + 100 * 0.0001 + 100 * 101 / 2 * 1e-8
    # To the decode worker, to the prefill worker, back, and back again.
    ttft_s = 4 * 0.0005 + prefill_s + steps_s[0]
    assert outcome.total.ttft_ms is not None
    assert outcome.total.tpot_ms is not None
    assert outcome.total.ttft_ms[0] == pytest.approx(ttft_s * 1e3)
    assert outcome.total.tpot_ms[0] == pytest.approx(sum(steps_s[1:]) / 2 * 1e3)
    assert outcome.total.mean_level == 3
    assert outcome.tokens_by_level == (0, 0, 3)


def test_a_short_prompt_is_computed_where_it_is_needed() -> None:
    simulation = Simulation(cluster_config(), COSTS)
    outcome = simulation.run(lone(11, 1))
    ttft_s = 2 * 0.0005 + (0.004 + 10 * 0.0001) + (0.008 + 3e-6 * 11)
    assert outcome.total.ttft_ms is not None
    assert outcome.total.ttft_ms[0] == pytest.approx(ttft_s * 1e3)
    assert next(iter(simulation.prefill.values())).status().num_computed_tokens == 0


def test_a_shared_prefix_is_computed_once() -> None:
    trace = SyntheticTrace.model_validate(
        {
            "num_requests": 20,
            "arrivals": {"kind": "poisson", "rate_per_s": 0.1},
            "kinds": [{"prompt": {"mean": 8, "spread": 0}, "output": {"mean": 4, "spread": 0}}],
            "conversations": {"num_shared_prefixes": 1, "shared_prefix_tokens": 1600},
        }
    )
    config = cluster_config(decode={"count": 1, "kv_tokens": 8192})
    simulation = Simulation(config, COSTS)
    simulation.run(trace)
    assert next(iter(simulation.prefill.values())).status().num_computed_tokens == 1607


def test_requests_are_moved_down_in_a_burst_and_up_after_it() -> None:
    trace = SyntheticTrace.model_validate(
        {
            "num_requests": 300,
            "arrivals": {"kind": "bursty", "rate_per_s": 12, "burst_ratio": 10},
            "kinds": [{"sla_class": "interactive", "output": {"mean": 100, "max": 400}}],
        }
    )
    config = cluster_config(decode={"count": 2, "max_rows": 16})
    moved = Simulation(config, COSTS).run(trace)
    assert moved.num_level_moves > 10
    assert min(moved.tokens_by_level) > 0
    fixed = Simulation(with_policy(config, "level-3"), COSTS).run(trace)
    assert (fixed.num_level_moves, fixed.tokens_by_level[:2]) == (0, (0, 0))
    assert moved.total.attainment > fixed.total.attainment


def test_newcomers_are_told_what_those_that_run_leave_to_them() -> None:
    simulation = Simulation(cluster_config(), COSTS)
    seen: list[Outlook | None] = []

    def look() -> None:
        seen.extend(s.outlook for s in simulation._router._view.snapshot().decode)

    for second in range(1, 4):
        simulation.clock.at(second, look)
    simulation.run(bursty(rate_per_s=100))
    assert any(outlook and outlook.tpot_s == 0.012 for outlook in seen)


def test_a_level_that_was_not_measured_is_refused() -> None:
    config = cluster_config(sla_classes={"default": {"min_level": 2, "max_level": 5}})
    with pytest.raises(InvalidConfig, match=r"sla_classes.default.max_level: 5 .* 1 to 3"):
        Simulation(config, COSTS)


def test_a_class_that_is_not_there_is_named() -> None:
    trace = SyntheticTrace.model_validate({"num_requests": 1, "kinds": [{"sla_class": "gold"}]})
    with pytest.raises(InvalidConfig, match="'gold' is not allowed; allowed: one of"):
        Simulation(cluster_config(), COSTS).run(trace)


def test_costs_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert type(COSTS).load(path) == COSTS
    path.write_text(path.read_text().replace('"hop_s": 0.0005', '"hop_s": -1'))
    with pytest.raises(InvalidConfig, match=r"costs.hop_s: -1"):
        type(COSTS).load(path)
