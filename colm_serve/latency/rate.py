"""How much is done a second, as measured: pure, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Prompt tokens that a worker's speed is taken from: some full passes.
COMPUTE_MEMORY_TOKENS = 4096


@dataclass
class Rate:
    """An amount a second; of what was measured about the last `memory` of the amount counts.

    A measurement of little counts for little, however many there are of it: a pass over one token
    takes almost as long as one over many.
    """

    memory: float
    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        kept = math.exp(-amount / self.memory)
        self.amount = kept * self.amount + amount
        self.seconds = kept * self.seconds + seconds

    @property
    def per_s(self) -> float | None:
        """None until something has been measured."""
        return self.amount / self.seconds if self.amount > 0 and self.seconds > 0 else None
