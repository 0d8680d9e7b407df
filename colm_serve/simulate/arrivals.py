"""When requests arrive: Poisson, bursty and diurnal processes, drawn one at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0)]


class _Arrivals(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rate_per_s: float = Field(gt=0, description="requests a second, over all the trace")


class PoissonArrivals(_Arrivals):
    """Independent arrivals at one rate."""

    kind: Literal["poisson"] = "poisson"

    def times(self, draw: random.Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += draw.expovariate(self.rate_per_s)
            yield now


class BurstyArrivals(_Arrivals):
    """A Poisson process that is `burst_ratio` times as fast in bursts (MMPP of two states).

    When there are bursts does not depend on the rate.
    """

    kind: Literal["bursty"] = "bursty"
    burst_ratio: float = Field(default=5.0, ge=1)
    burst_s: Seconds = Field(default=5.0, description="a burst's mean duration")
    calm_s: Seconds = Field(default=20.0, description="mean duration of the time between two")

    def times(self, draw: random.Random) -> Iterator[float]:
        share = self.burst_s / (self.burst_s + self.calm_s)
        calm_rate = self.rate_per_s / (1 + share * (self.burst_ratio - 1))
        now, is_burst = 0.0, False
        draw_state = random.Random(draw.random())
        state_end = draw_state.expovariate(1 / self.calm_s)
        while True:
            gap_s = draw.expovariate(calm_rate * (self.burst_ratio if is_burst else 1))
            if now + gap_s <= state_end:
                now += gap_s
                yield now
                continue
            # Exponential gaps have no memory: what was left of this one is drawn anew.
            now, is_burst = state_end, not is_burst
            state_end += draw_state.expovariate(1 / (self.burst_s if is_burst else self.calm_s))


class DiurnalArrivals(_Arrivals):
    """A Poisson process whose rate swings by `amplitude` of its mean each `period_s`."""

    kind: Literal["diurnal"] = "diurnal"
    amplitude: float = Field(default=0.8, ge=0, le=1)
    period_s: Seconds = 86400.0

    def times(self, draw: random.Random) -> Iterator[float]:
        """Lewis and Shedler's thinning."""
        most = self.rate_per_s * (1 + self.amplitude)
        now = 0.0
        while True:
            now += draw.expovariate(most)
            swing = math.sin(2 * math.pi * now / self.period_s)
            if draw.random() * most <= self.rate_per_s * (1 + self.amplitude * swing):
                yield now


Arrivals = Annotated[
    PoissonArrivals | BurstyArrivals | DiurnalArrivals, Field(discriminator="kind")
]
