"""LLaMA 3's rescaling of the rotary embedding, as a model's config has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, cast

from colm_serve.errors import InvalidConfig


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The frequency rescaling of LLaMA 3.1 and later.

    Raises:
        InvalidConfig: a value that is not allowed, named with what is.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_positive_number(value):
                raise InvalidConfig(f"rope_scaling.{field.name}", value, "a positive number")
        if self.high_freq_factor <= self.low_freq_factor:
            allowed = f"a number above low_freq_factor, {self.low_freq_factor}"
            raise InvalidConfig("rope_scaling.high_freq_factor", self.high_freq_factor, allowed)

    @classmethod
    def from_dict(cls, raw: Any) -> Llama3RopeScaling:
        """Build from a config's `rope_scaling`."""
        keys = [f.name for f in fields(cls)]
        if not isinstance(raw, dict) or sorted(raw) != sorted(keys):
            raise InvalidConfig("rope_scaling", raw, f"null or an object of {', '.join(keys)}")
        return cls(**raw)


def is_positive_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast(float, value) < math.inf
