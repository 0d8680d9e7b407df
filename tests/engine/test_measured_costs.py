"""What a worker measures of its model before it serves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from colm_serve.engine import timing
from colm_serve.engine.prefill_cost import measure_prefill_cost
from colm_serve.engine.step_cost import measure_step_cost
from colm_serve.engine.timing import least_s
from tests.engine.paged import open_chain_1, poisoned_pool
from tests.helpers import whole_model


class Machine:
    """A clock that moves on while a job runs on it, as the next of its times says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(timing, "time", self)

    def perf_counter(self) -> float:
        return self.now_s

    def run(self, name: str, times_s: list[float]) -> None:
        self.order.append(name)
        self.now_s += times_s.pop(0) if len(times_s) > 1 else times_s[0]


def test_each_is_timed_in_turn_and_its_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    a = partial(machine.run, "a", [9.0, 1.0, 5.0])
    b = partial(machine.run, "b", [2.0, 7.0, 3.0])
    assert least_s([a, b], budget_s=1000.0) == [1.0, 2.0]
    assert machine.order == ["a", "b"] * 5


def test_rounds_go_on_while_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    a = partial(machine.run, "a", [9.0, 9.0, 9.0, 9.0, 5.0, 4.0, 4.0])
    b = partial(machine.run, "b", [2.0])
    assert least_s([a, b], budget_s=1000.0) == [4.0, 2.0]
    assert machine.order == ["a", "b"] * 7
    falling = partial(machine.run, "c", [float(2**n) for n in range(40, 0, -1)])
    machine.order.clear()
    least_s([falling], budget_s=1e20)
    assert machine.order == ["c"] * 16


def test_none_runs_once_the_time_is_up_but_each_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    runs = [partial(machine.run, name, [10.0]) for name in "abc"]
    assert least_s(runs, budget_s=5.0) == [10.0, 10.0, 10.0]
    assert machine.order == ["a", "b", "c"]


def test_measured_step_cost_has_a_share_for_each_chain(folder: Path) -> None:
    cost = measure_step_cost(whole_model(folder), poisoned_pool(folder))
    parts = (cost.chain_s, cost.row_s, cost.wide_row_s, cost.cached_token_s)
    assert all(len(part) == 3 and min(part) >= 0 for part in parts)
    assert 0 < cost.step_s((1,)) <= cost.step_s((1, 1, 1)) <= cost.step_s((8, 8, 8)) < 10


def test_a_measured_prefill_cost_grows_with_the_prompt(folder: Path) -> None:
    cost = measure_prefill_cost(open_chain_1(folder).model, poisoned_pool(folder), 64)
    assert cost.chunk_tokens == 64
    assert min(cost.pass_s, cost.attended_key_s) >= 0
    assert 0 < cost.seconds(0, 1) < cost.seconds(0, 64) <= cost.seconds(64, 128) < 10
