"""Service-level agreement classes: what kinds of requests are promised."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field, model_validator

from colm_serve.config.section import Count, Seconds, Section, TargetMs


class SlaClass(Section):
    """What a kind of request is promised, and the chain levels it may run at.

    The router takes the highest level inside the bounds at which the targets hold; with no
    targets that is `max_level`. Where not everybody can have it, those of more `weight` have more.
    """

    ttft_ms: TargetMs | None = None
    tpot_ms: TargetMs | None = None
    min_level: Count = 1
    max_level: Count | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    deadline_s: Seconds = Field(default=300.0, description="from receipt to the last token")

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> SlaClass:
        if self.max_level is not None and self.min_level > self.max_level:
            raise ValueError(f"min_level {self.min_level} is above max_level {self.max_level}")
        return self


#: What there is without any config.
SLA_CLASSES = {
    "default": SlaClass(),
    "interactive": SlaClass(ttft_ms=1000, tpot_ms=100, weight=4, deadline_s=60),
    "batch": SlaClass(weight=0.25, deadline_s=3600),
}


def heavier_tpot_s(sla_classes: Mapping[str, SlaClass]) -> dict[str, float]:
    """By the name of a class: the strictest `tpot_ms` of those with more weight, in seconds.

    Infinite where these have none; a class with the most weight is not there.
    """
    strictest: dict[str, float] = {}
    for name, sla in sla_classes.items():
        heavier = [other for other in sla_classes.values() if other.weight > sla.weight]
        if heavier:
            targets = [other.tpot_ms / 1e3 for other in heavier if other.tpot_ms is not None]
            strictest[name] = min(targets, default=math.inf)
    return strictest
