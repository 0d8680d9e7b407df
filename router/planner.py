"""How many workers of each kind, and how much model each token gets: pure.

Prefill is planned from the prompt tokens that arrive and how long a prompt may wait; decode from
how many tokens a second a worker makes while it keeps the time that each may take. All classes
run at their highest level where the largest allowed number of decode workers can make that; else
levels are lowered, the same number of steps for every class, as far as it takes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from colm_serve.config import PlannerConfig
from colm_serve.core import DecodeStatus, PrefillCost, StepCost
from colm_serve.router.placing.snapshot import ClusterSnapshot

#: Workers are planned to be busy for so much of the time: requests come in bursts.
MAX_UTILIZATION = 0.8


@dataclass(frozen=True)
class Demand:
    """What one SLA class has asked for lately; lengths are means, in tokens.

    Of `prompt_tokens` prefill workers compute `computed_tokens`, the others are cached.
    """

    requests_per_s: float
    prompt_tokens: float
    computed_tokens: float
    output_tokens: float
    min_level: int
    max_level: int
    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of output."""
        return self.requests_per_s * self.output_tokens

    def lowered(self, num_steps: int) -> int:
        """The level so many steps below the highest, if the bounds have it."""
        return max(self.min_level, self.max_level - num_steps)


@dataclass(frozen=True)
class WorkerCosts:
    """What a worker of each kind does; all are taken to be alike."""

    prefill_cost: PrefillCost
    step_cost: StepCost
    max_rows: int
    num_levels: int

    @classmethod
    def of(cls, cluster: ClusterSnapshot) -> WorkerCosts | None:
        """Those of the slowest workers; None while no decode worker answers."""
        if not cluster.decode:
            return None
        prefill = (p.status.cost for p in cluster.prefill)
        slowest = max((d.status for d in cluster.decode), key=_full_step_s)
        return cls(
            prefill_cost=max(prefill, key=_full_pass_s, default=PrefillCost(0.0, 0.0, 0.0, 1)),
            step_cost=slowest.step_cost,
            max_rows=slowest.max_rows,
            num_levels=slowest.num_levels,
        )


@dataclass(frozen=True)
class Plan:
    """Worker counts, the share of the tokens that each level makes, level 1 first, and why."""

    num_prefill: int
    num_decode: int
    level_share: tuple[float, ...]
    reason: str


def make_plan(
    demands: Sequence[Demand],
    costs: WorkerCosts,
    bounds: PlannerConfig,
    num_prefill: int,
    num_decode: int,
) -> Plan:
    """The plan that follows `num_prefill` and `num_decode` workers.

    More workers are planned as soon as they are needed, fewer only if they would do for
    `bounds.hysteresis` more load too: so a load that varies less than that changes nothing.
    """
    margin = 1 + bounds.hysteresis
    more = [replace(d, requests_per_s=d.requests_per_s * margin) for d in demands]
    prefill = _between(
        num_prefill, prefill_count(demands, costs, bounds), prefill_count(more, costs, bounds)
    )
    decode = _between(
        num_decode, decode_count(demands, costs, bounds), decode_count(more, costs, bounds)
    )
    shares = level_share(demands, costs, decode)
    return Plan(prefill, decode, shares, _reason(demands, costs, prefill, decode, shares))


def prefill_count(demands: Sequence[Demand], costs: WorkerCosts, bounds: PlannerConfig) -> int:
    """The fewest prefill workers that keep up and, if any number can, keep every TTFT target."""
    busy = _busy_prefill_workers(demands, costs)
    fewest = _rounded(busy, bounds.min_prefill, bounds.max_prefill)
    for count in range(fewest, bounds.max_prefill + 1):
        if _keeps_ttft(demands, costs, busy, count):
            return count
    return fewest if _is_ttft_hopeless(demands, costs) else bounds.max_prefill


def decode_count(demands: Sequence[Demand], costs: WorkerCosts, bounds: PlannerConfig) -> int:
    """The decode workers that run every class at its highest level, or as many as allowed."""
    busy = _busy_decode_workers(demands, costs, num_steps=0)
    return _rounded(busy, bounds.min_decode, bounds.max_decode)


def level_share(
    demands: Sequence[Demand], costs: WorkerCosts, num_decode: int
) -> tuple[float, ...]:
    """The share of all tokens that each level makes on so many decode workers, level 1 first.

    Between the last number of steps down that is too much work and the first that is not, both
    are mixed so that the workers are just as busy as they may be.
    """
    allowed = num_decode * MAX_UTILIZATION
    busy = [_busy_decode_workers(demands, costs, steps) for steps in range(costs.num_levels)]
    num_steps = next((i for i, each in enumerate(busy) if each <= allowed), costs.num_levels - 1)
    tokens = _tokens_by_level(demands, costs, num_steps)
    if num_steps > 0 and busy[num_steps] < allowed and math.isfinite(busy[num_steps - 1]):
        higher = _tokens_by_level(demands, costs, num_steps - 1)
        part = (allowed - busy[num_steps]) / (busy[num_steps - 1] - busy[num_steps])
        tokens = [part * h + (1 - part) * t for h, t in zip(higher, tokens, strict=True)]
    total = sum(tokens)
    return tuple(t / total for t in tokens) if total else (0.0,) * costs.num_levels


def _rounded(busy: float, fewest: int, most: int) -> int:
    """The workers to have for so many busy ones."""
    wanted = most if math.isinf(busy) else math.ceil(busy / MAX_UTILIZATION)
    return max(fewest, min(most, wanted))


def _busy_prefill_workers(demands: Sequence[Demand], costs: WorkerCosts) -> float:
    """Workers' worth of work; what has not been measured costs nothing."""
    return sum(d.requests_per_s * _prompt_s(d, costs) for d in demands)


def _keeps_ttft(
    demands: Sequence[Demand], costs: WorkerCosts, busy: float, num_workers: int
) -> bool:
    """Whether each class's prompts are in time on average, queued as in M/D/1 at each worker."""
    utilization = busy / num_workers
    if utilization >= 1:
        return False
    num_requests = sum(d.requests_per_s for d in demands)
    service_s = busy / num_requests if num_requests else 0.0
    wait_s = utilization * service_s / (2 * (1 - utilization))
    return all(d.ttft_s is None or wait_s + _prompt_s(d, costs) <= d.ttft_s for d in demands)


def _is_ttft_hopeless(demands: Sequence[Demand], costs: WorkerCosts) -> bool:
    """Whether a prompt would be late even at an idle worker, so that more of them do not help."""
    return any(d.ttft_s is not None and _prompt_s(d, costs) > d.ttft_s for d in demands)


def _prompt_s(demand: Demand, costs: WorkerCosts) -> float:
    num_tokens = round(demand.prompt_tokens)
    return costs.prefill_cost.seconds(num_tokens - round(demand.computed_tokens), num_tokens)


def _busy_decode_workers(demands: Sequence[Demand], costs: WorkerCosts, num_steps: int) -> float:
    """Workers' worth of work with every class so many levels down; inf where a target is lost."""
    return sum(
        d.tokens_per_s * _token_s(d, costs, d.lowered(num_steps)) for d in demands if d.tokens_per_s
    )


def _token_s(demand: Demand, costs: WorkerCosts, level: int) -> float:
    """A worker's seconds for a token at `level`, in steps as full as the TPOT target allows.

    Where it does not even allow for one row that is inf, but at the lowest level what it is in
    full steps: late tokens are better than none.
    """
    context = demand.prompt_tokens + demand.output_tokens / 2

    def step_s(num_rows: int) -> float:
        return costs.step_cost.step_s([num_rows] * level, [int(num_rows * context)] * level)

    num_rows = costs.max_rows
    if demand.tpot_s is not None:
        num_rows = bisect_right(range(1, costs.max_rows + 1), demand.tpot_s, key=step_s)
    if num_rows == 0:
        if level > demand.min_level:
            return math.inf
        num_rows = costs.max_rows
    return step_s(num_rows) / num_rows


def _tokens_by_level(demands: Sequence[Demand], costs: WorkerCosts, num_steps: int) -> list[float]:
    """Tokens a second that each level makes, with every class so many levels down."""
    tokens = [0.0] * costs.num_levels
    for demand in demands:
        tokens[demand.lowered(num_steps) - 1] += demand.tokens_per_s
    return tokens


def _full_pass_s(cost: PrefillCost) -> float:
    return cost.seconds(0, cost.chunk_tokens)


def _full_step_s(status: DecodeStatus) -> float:
    return status.step_cost.step_s([status.max_rows] * status.num_levels)


def _between(current: int, fewest: int, most: int) -> int:
    return max(fewest, min(current, most))


def _reason(
    demands: Sequence[Demand],
    costs: WorkerCosts,
    num_prefill: int,
    num_decode: int,
    shares: Sequence[float],
) -> str:
    """One line for whoever wonders why."""
    requests = sum(d.requests_per_s for d in demands)
    computed = sum(d.requests_per_s * d.computed_tokens for d in demands)
    tokens = sum(d.tokens_per_s for d in demands)
    prefill = _busy_prefill_workers(demands, costs)
    decode = _busy_decode_workers(demands, costs, num_steps=0)
    levels = ", ".join(f"{share:.0%} at {i}" for i, share in enumerate(shares, 1) if share)
    return (
        f"{requests:.3g} requests/s bring {computed:.0f} prompt tokens/s, work for {prefill:.2f} "
        f"prefill workers, and {tokens:.0f} output tokens/s, at the highest levels work for "
        f"{decode:.2f} decode workers: {num_prefill} prefill and {num_decode} decode workers, "
        f"levels: {levels or 'any'}"
    )
