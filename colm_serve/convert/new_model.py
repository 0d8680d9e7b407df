"""Where a conversion may write."""

from __future__ import annotations

from pathlib import Path

from colm_serve.errors import InvalidArgument


def check_new(out: Path) -> None:
    """Raise InvalidArgument if `out` is there already: a conversion replaces nothing."""
    if out.exists():
        raise InvalidArgument("out", str(out), "a folder that is not there yet")
