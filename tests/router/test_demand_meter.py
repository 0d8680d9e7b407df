from __future__ import annotations

import pytest

from colm_serve.config import SlaClass
from colm_serve.router.demand_meter import MEMORY_S, DemandMeter
from colm_serve.router.request import Usage

CLASSES = {"chat": SlaClass(ttft_ms=200, tpot_ms=20, min_level=2), "batch": SlaClass(max_level=1)}
USAGE = Usage(num_prompt_tokens=100, num_cached_tokens=40, num_shipped_tokens=60,
              num_output_tokens=10)  # fmt: skip


def run(meter: DemandMeter, sla_class: str, gap_s: float, begin: float, end: float) -> None:
    """A request every `gap_s`, each through at once."""
    for number in range(int((end - begin) / gap_s)):
        meter.arrived(sla_class, begin + number * gap_s)
        meter.finished(sla_class, USAGE, begin + number * gap_s)


def test_what_a_class_asks_for_and_is_promised() -> None:
    meter = DemandMeter(CLASSES, num_levels=4, now=0.0)
    run(meter, "chat", 0.5, 0.0, 1000.0)
    (demand,) = meter.demands(1000.0)
    assert demand.requests_per_s == pytest.approx(2, rel=0.02)
    assert demand.prompt_tokens == pytest.approx(100)
    assert demand.computed_tokens == pytest.approx(60)
    assert demand.output_tokens == pytest.approx(10)
    assert (demand.min_level, demand.max_level) == (2, 4)
    assert (demand.ttft_s, demand.tpot_s) == (0.2, 0.02)


def test_a_new_meter_knows_the_rate_at_once() -> None:
    meter = DemandMeter(CLASSES, num_levels=4, now=0.0)
    run(meter, "batch", 0.1, 0.0, 5.0)
    (demand,) = meter.demands(5.0)
    assert demand.requests_per_s == pytest.approx(10, rel=0.1)
    assert (demand.max_level, demand.ttft_s) == (1, None)


def test_the_past_is_forgotten() -> None:
    meter = DemandMeter(CLASSES, num_levels=4, now=0.0)
    run(meter, "chat", 0.1, 0.0, 500.0)
    run(meter, "chat", 1.0, 500.0, 500.0 + 5 * MEMORY_S)
    (demand,) = meter.demands(500.0 + 5 * MEMORY_S)
    assert demand.requests_per_s == pytest.approx(1, rel=0.1)


def test_a_class_that_nothing_is_known_of_is_left_out() -> None:
    meter = DemandMeter(CLASSES, num_levels=4, now=0.0)
    assert meter.demands(0.0) == ()
    meter.arrived("chat", 1.0)
    assert meter.demands(2.0) == (), "how long its answers are is not known yet"
