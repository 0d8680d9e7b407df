"""What a process says of its own progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Health:
    """One process at the moment it was asked.

    Its event loop has run nothing for `loop_stalled_s` seconds and has used `loop_cpu_s` of a
    processor since it started; its engine has been in the present pass for `turn_s`, 0 between two.
    """

    pid: int
    loop_stalled_s: float = 0.0
    loop_cpu_s: float = 0.0
    turn_s: float = 0.0
