"""Whether a process that does not answer is busy or dead. Pure.

One slow answer says neither. A process is dead when its work has demonstrably stood still, or when
it has been too busy to be of use for so long that a fresh one serves its clients better.
"""

from __future__ import annotations

from colm_serve.core import Health

#: Less of a processor than this is not work, but what idle threads use of it.
_IDLE_SHARE = 0.02


class Pulse:
    """The signs of life of one process.

    Args:
        still_s: seconds in which neither answers nor processor time show any progress.
        busy_s: seconds for which progress without an answer is borne with.
        now: on a clock that never goes back.
    """

    def __init__(self, still_s: float, busy_s: float, now: float) -> None:
        self._still_s = still_s
        self._busy_s = busy_s
        self._heard_at = now
        self._loop_work = _Work()
        self._work = _Work()
        self.pid: int | None = None

    def answered(self, health: Health, now: float) -> str | None:
        """It has said how it is; returns why it is as good as dead, None if it is not."""
        self.pid, self._heard_at = health.pid, now
        self._work = _Work()
        if health.turn_s > self._busy_s:
            return f"its engine has been in one pass for {health.turn_s:.0f} s"
        if not health.loop_stalled_s:
            self._loop_work = _Work()
            return None
        still_s = self._loop_work.still_s(health.loop_cpu_s, now)
        if min(still_s, health.loop_stalled_s) >= self._still_s:
            return f"its event loop has stood still for {health.loop_stalled_s:.0f} s"
        if health.loop_stalled_s > self._busy_s:
            return f"its event loop has been in one call for {health.loop_stalled_s:.0f} s"
        return None

    def silent(self, cpu_s: float | None, now: float) -> str | None:
        """It has not answered in time; returns why it is as good as dead, None if it is not.

        Args:
            cpu_s: processor time that it has used since it started; None if that is not known.
        """
        silent_s = now - self._heard_at
        if cpu_s is not None and self._work.still_s(cpu_s, now) >= self._still_s:
            return f"it has neither answered nor worked for {silent_s:.0f} s"
        if silent_s > self._busy_s:
            return f"it has been too busy to answer for {silent_s:.0f} s"
        return None


class _Work:
    """Since when a count of processor seconds has not grown."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def still_s(self, cpu_s: float, now: float) -> float:
        """Seconds for which there has been no progress, as far as has been seen."""
        if self._last is not None:
            then, before_s = self._last
            if cpu_s - before_s <= _IDLE_SHARE * (now - then):
                return now - then
        self._last = (now, cpu_s)
        return 0.0
