"""Times decode steps before there are any requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from colm_serve.core import StepCost
from colm_serve.engine.step import Segment, run_pass
from colm_serve.engine.timing import least_s
from colm_serve.kv.pool import KvPool
from colm_serve.latency.cost_fit import fit_costs
from colm_serve.model.serving import ServingModel

_FAR_TOKENS = 1024
_NUM_ROWS = (1, *(multiple * StepCost.NUM_NARROW_ROWS for multiple in (1, 2, 4)))


def measure_step_cost(model: ServingModel, pool: KvPool, budget_s: float = 4.0) -> StepCost:
    """Time steps of one row, of several, of many, and of one behind many tokens, at each level.

    Uses the pool's first pages as scratch: call it before anything is cached.
    """
    table = pool.table(range(min(pool.num_pages, -(-_FAR_TOKENS // pool.page_size))))
    num_tokens = min(_FAR_TOKENS, len(table.pages) * pool.page_size, model.config.max_context)
    shapes = [(num_rows, 1) for num_rows in _NUM_ROWS] + [(1, num_tokens)]
    runs, loads = [], []
    for level in range(1, model.num_chains + 1):
        for num_rows, num_attended in shapes:
            row = Segment((0,), num_attended - 1, level, table)
            runs.append(partial(_greedy_step, model, pool, [row] * num_rows))
            of_chain = _load(num_rows, num_attended)
            of_no_chain = [0.0] * len(of_chain)
            num_above = model.num_chains - level
            loads.append([*of_chain * level, *of_no_chain * num_above])
    fitted = fit_costs(loads, least_s(runs, budget_s))
    num_kinds = len(_load(1, 1))
    return StepCost(*(tuple(fitted[kind::num_kinds]) for kind in range(num_kinds)))


def _load(num_rows: int, num_attended: int) -> list[float]:
    """What each coefficient of a chain's `StepCost` counts, in the order of its fields."""
    num_wide = max(0, num_rows - StepCost.NUM_NARROW_ROWS)
    return [1.0, num_rows - 1.0, float(num_wide), float(num_rows * num_attended)]


def _greedy_step(model: ServingModel, pool: KvPool, segments: Sequence[Segment]) -> None:
    run_pass(model, pool, segments).logits_SV.argmax(dim=-1).tolist()
