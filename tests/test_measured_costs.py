"""Costs for the simulator, asked of a cluster's workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colm_serve.core import (
    DecodeStatus,
    PrefillCost,
    PrefillStatus,
    StepCost,
    TransferCost,
)
from colm_serve.errors import Unavailable
from colm_serve.measured_costs import costs_of
from colm_serve.simulate.simulation import Simulation
from tests.simulate.clusters import cluster_config
from tests.simulate.test_simulation import lone

STEP = StepCost((0.004, 0.002, 0.001), (0.0003, 0.0002, 0.0001), (0.0, 0.0, 0.0), (1e-6,) * 3)


def statuses() -> tuple[DecodeStatus, PrefillStatus]:
    """Those of simulated workers, but for what they cost."""
    simulation = Simulation(cluster_config(), costs_of(made_up(), 0.001))
    (decode, *_), (prefill,) = simulation.decode.values(), simulation.prefill.values()
    return decode.status(), prefill.status()


def made_up() -> tuple[DecodeStatus, PrefillStatus]:
    decode = DecodeStatus(
        "d", 1, "kv", 3, 8, 0, (0, 0, 0), 9, 9, 16, STEP, 0.0, 256, 0, 0, 0,
        transfer_cost=TransferCost(0.01, 2e-5),
    )  # fmt: skip
    cost = PrefillCost(0.001, 1e-4, 1e-8, 512)
    return decode, PrefillStatus("p", 1, "kv", 0, 0, 0, 0.0, cost, 9, 9, 0, 0)


def test_a_simulated_worker_tells_the_costs_that_it_has() -> None:
    costs = costs_of(made_up(), 0.001)
    assert costs_of(statuses(), 0.001) == costs
    assert costs.step.step_cost == STEP
    assert (costs.transfer_token_s, costs.hop_s) == (2e-5, 0.001)
    assert Simulation(cluster_config(), costs).run(lone(50, 4)).total.num_refused == 0


def test_a_kind_of_worker_that_is_not_there_is_named() -> None:
    decode, prefill = made_up()
    with pytest.raises(Unavailable, match="no prefill worker"):
        costs_of([decode, replace(decode, worker_id="e")], 0.001)
    with pytest.raises(Unavailable, match="no decode worker"):
        costs_of([prefill], 0.001)
