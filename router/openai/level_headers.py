"""What clients are told of the level beside their answer: HTTP headers, trailing gRPC metadata."""

from __future__ import annotations

from collections.abc import Sequence

from colm_serve.router.request import Started

LEVEL = "colm-level"
BROWNOUT = "colm-brownout"


def level_headers(starts: Sequence[Started]) -> dict[str, str]:
    """The lowest level that any of an answer's generations began at, and why, if for load."""
    if not starts:
        return {}
    is_brownout = any(started.is_brownout for started in starts)
    level = min(started.level for started in starts)
    return {LEVEL: str(level), BROWNOUT: "true" if is_brownout else "false"}
