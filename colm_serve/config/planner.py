"""Worker counts that follow the load."""

from __future__ import annotations

from pydantic import Field, model_validator

from colm_serve.config.section import Count, Seconds, Section


class PlannerConfig(Section):
    """Whether worker counts follow the load, and how far; else they stay as configured."""

    enabled: bool = False
    min_prefill: Count = 1
    max_prefill: Count = 8
    min_decode: Count = 1
    max_decode: Count = 8
    interval_s: Seconds = 30.0
    hysteresis: float = Field(
        default=0.25, ge=0, le=10, description="load is let grow by this share before workers go"
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> PlannerConfig:
        for kind in ("prefill", "decode"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low > high:
                raise ValueError(f"min_{kind} {low} is above max_{kind} {high}")
        return self
