"""Prefill workers that decode while no decode worker can."""

from __future__ import annotations

from pydantic import Field

from colm_serve.config.section import Count, Seconds, Section


class StandbyConfig(Section):
    """Prefill workers finish texts at level 1 while there is no decode worker.

    They load the head, and chain 1 once more, when that happens, and drop them after it.
    """

    enabled: bool = True
    after_s: Seconds = Field(
        default=2.0, description="how long a request waits for a decode worker first"
    )
    kv_tokens: Count = Field(default=16384, description="beside those of prefill.kv_tokens")
