"""Steps of an unchanged batch, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRun:
    """Steps one after another: the first takes `first_s`, each later one `growth_s` more.

    They grow because each row attends to one token more than before.
    """

    begin: float
    first_s: float
    growth_s: float

    def end_of(self, num_steps: int) -> float:
        """When so many steps are done."""
        growth_s = self.growth_s * (num_steps * (num_steps - 1) / 2)
        return self.begin + num_steps * self.first_s + growth_s

    def num_done(self, now: float) -> int:
        """The steps that have ended by then."""
        elapsed = now - self.begin
        if self.growth_s > 0:
            half = self.first_s / self.growth_s - 0.5
            num_steps = int(math.sqrt(half * half + 2 * elapsed / self.growth_s) - half)
        else:
            num_steps = int(elapsed / self.first_s) if self.first_s > 0 else 0
        # The root is rounded, `end_of` decides.
        while num_steps > 0 and self.end_of(num_steps) > now:
            num_steps -= 1
        while self.first_s > 0 and self.end_of(num_steps + 1) <= now:
            num_steps += 1
        return num_steps
