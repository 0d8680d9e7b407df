"""Which shared memory a process has."""

from __future__ import annotations

from pathlib import Path


def num_segments(pid: int) -> int:
    """Segments of `transport.shared_memory` that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text("ascii", errors="replace")
    return maps.count("/memfd:colm-kv")
