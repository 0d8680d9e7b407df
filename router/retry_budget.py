"""Bounds how often requests are tried again, so that failures never multiply the load. Pure."""

from __future__ import annotations

#: Retries a second that any load may have, few requests as there may be.
MIN_PER_S = 10.0


class RetryBudget:
    """A token bucket: a request brings `share` of a retry, a second brings `MIN_PER_S`.

    It begins full with `burst` retries and never holds more: as many as there are requests that
    one failure can hit at once. Times are seconds on any clock that never goes back.
    """

    def __init__(self, share: float, burst: int, now: float) -> None:
        self._share = share
        self._burst = float(burst)
        self._num_left = self._burst
        self._filled_at = now

    def add_request(self) -> None:
        """A request has come."""
        self._num_left = min(self._burst, self._num_left + self._share)

    def take(self, now: float) -> bool:
        """Use up one retry; False, and nothing is taken, where none is left."""
        if self.num_left(now) < 1:
            return False
        self._num_left -= 1
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until there is one at the latest."""
        return max(0.0, 1 - self.num_left(now)) / MIN_PER_S

    def num_left(self, now: float) -> float:
        self._num_left = min(self._burst, self._num_left + (now - self._filled_at) * MIN_PER_S)
        self._filled_at = now
        return self._num_left
