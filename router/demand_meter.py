"""What clients have asked for lately, class by class: the planner's view of the load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colm_serve.config import SlaClass
from colm_serve.router.planner import Demand
from colm_serve.router.request import Usage

#: What is this old counts for 1/e of what is new.
MEMORY_S = 60.0


@dataclass
class _Sums:
    """Each weighted by age, as of `at`."""

    at: float
    seconds: float = 0.0
    num_requests: float = 0.0
    num_finished: float = 0.0
    num_prompt_tokens: float = 0.0
    num_computed_tokens: float = 0.0
    num_output_tokens: float = 0.0

    def age(self, now: float) -> None:
        weight = math.exp((self.at - now) / MEMORY_S)
        self.at = now
        self.seconds = MEMORY_S + (self.seconds - MEMORY_S) * weight
        self.num_requests *= weight
        self.num_finished *= weight
        self.num_prompt_tokens *= weight
        self.num_computed_tokens *= weight
        self.num_output_tokens *= weight


class DemandMeter:
    """Counts requests as they come and tokens as they finish, with exponential forgetting."""

    def __init__(self, classes: Mapping[str, SlaClass], num_levels: int, now: float) -> None:
        self._classes = classes
        self._num_levels = num_levels
        self._sums = {name: _Sums(now) for name in classes}

    def arrived(self, sla_class: str, now: float) -> None:
        sums = self._sums[sla_class]
        sums.age(now)
        sums.num_requests += 1

    def finished(self, sla_class: str, usage: Usage, now: float) -> None:
        sums = self._sums[sla_class]
        sums.age(now)
        sums.num_finished += 1
        sums.num_prompt_tokens += usage.num_prompt_tokens
        sums.num_computed_tokens += usage.num_prompt_tokens - usage.num_cached_tokens
        sums.num_output_tokens += usage.num_output_tokens

    def demands(self, now: float) -> tuple[Demand, ...]:
        """Of the classes of which a request has finished: of others no lengths are known."""
        for sums in self._sums.values():
            sums.age(now)
        return tuple(
            self._demand(self._classes[name], sums)
            for name, sums in self._sums.items()
            if sums.num_finished and sums.seconds
        )

    def _demand(self, sla: SlaClass, sums: _Sums) -> Demand:
        return Demand(
            requests_per_s=sums.num_requests / sums.seconds,
            prompt_tokens=sums.num_prompt_tokens / sums.num_finished,
            computed_tokens=sums.num_computed_tokens / sums.num_finished,
            output_tokens=sums.num_output_tokens / sums.num_finished,
            min_level=sla.min_level,
            max_level=min(sla.max_level or self._num_levels, self._num_levels),
            ttft_s=None if sla.ttft_ms is None else sla.ttft_ms / 1000,
            tpot_s=None if sla.tpot_ms is None else sla.tpot_ms / 1000,
        )
