"""Prefill workers: their chunks, and the attention of long prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from colm_serve.config.section import Count, Seconds, Section
from colm_serve.config.worker import WorkerConfig


class SparseConfig(Section):
    """Long prompts' rows attend to chosen keys only: faster, and no longer exact.

    The keys and values are then an approximation that every level reads, and decode workers cache
    and share them as they do exact ones.
    """

    selector: Literal["none", "minference", "adaptive"] = Field(
        default="none",
        description="minference: the patterns of pattern_file; adaptive: the fewest key blocks "
        "whose estimated attention mass is at least gamma",
    )
    pattern_file: Path | None = Field(
        default=None, description="as `colm search-patterns` writes it, in MInference's format"
    )
    gamma: float = Field(default=0.95, gt=0, le=1)
    min_tokens: Count = Field(
        default=16384, description="shorter prompts attend to all keys; the whole prompt counts"
    )

    @model_validator(mode="after")
    def _patterns_are_given_where_read(self) -> SparseConfig:
        if (self.selector == "minference") != (self.pattern_file is not None):
            raise ValueError(
                f"pattern_file {self.pattern_file} with selector {self.selector}: minference "
                "needs one, the others read none"
            )
        return self


class PrefillConfig(WorkerConfig):
    """A prefill worker: chunks of several prompts up to `chunk_tokens` a forward pass."""

    chunk_tokens: Count = 512
    max_queued: Count = 64
    stall_timeout_s: Seconds = 30.0
    sparse: SparseConfig = SparseConfig()
