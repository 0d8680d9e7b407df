"""A limit per minute: a bucket that holds a minute's worth and fills steadily. Pure, and exact."""

from __future__ import annotations

_NS_PER_S = 10**9
_NS_PER_MIN = 60 * _NS_PER_S


class TokenBucket:
    """Grants at most `per_min` at once, and `per_min` more in every minute.

    All in whole numbers, a token being as many parts as a minute has nanoseconds: no rounding adds
    up, however many grants there are.
    """

    def __init__(self, per_min: int, now_s: float) -> None:
        self.per_min = per_min
        self._parts = per_min * _NS_PER_MIN
        self._filled_at_ns = round(now_s * _NS_PER_S)

    def take(self, count: int, now_s: float) -> float | None:
        """Take `count` tokens, at most `per_min`.

        Returns:
            None once taken; else the seconds until there will be so many, and none are taken.
        """
        self._fill(now_s)
        missing = count * _NS_PER_MIN - self._parts
        if missing > 0:
            return -(-missing // self.per_min) / _NS_PER_S
        self._parts -= count * _NS_PER_MIN
        return None

    def give_back(self, count: int, now_s: float) -> None:
        """Return tokens that were taken and not used."""
        self._fill(now_s)
        self._add(count * _NS_PER_MIN)

    def num_left(self, now_s: float) -> int:
        """Whole tokens that could be taken now."""
        self._fill(now_s)
        return self._parts // _NS_PER_MIN

    def _fill(self, now_s: float) -> None:
        now_ns = round(now_s * _NS_PER_S)
        self._add(max(0, now_ns - self._filled_at_ns) * self.per_min)
        self._filled_at_ns = max(now_ns, self._filled_at_ns)

    def _add(self, parts: int) -> None:
        self._parts = min(self.per_min * _NS_PER_MIN, self._parts + parts)
