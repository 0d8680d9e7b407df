"""The stages of a request and when it reached them: the only source of latency metrics."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

#: Seconds on a clock that never goes back.
Clock = Callable[[], float]


class Stage(Enum):
    RECEIVED = auto()
    PLACED = auto()
    ADMITTED = auto()
    FIRST_TOKEN = auto()
    FINISHED = auto()


class Lifecycle:
    """One request's stages; each keeps the time at which it was first reached.

    `token_gap_s` is the time from the last token but one to the last; None before two have come.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reached: dict[Stage, float] = {}
        self._last_token_at: float | None = None
        self.token_gap_s: float | None = None
        self._num_tokens = 0
        self.reach(Stage.RECEIVED)

    def reach(self, stage: Stage) -> None:
        self._reached.setdefault(stage, self._clock())

    def token(self) -> None:
        """Note that a token has come."""
        now = self._clock()
        self.token_gap_s = None if self._last_token_at is None else now - self._last_token_at
        self._last_token_at = now
        self._num_tokens += 1
        self._reached.setdefault(Stage.FIRST_TOKEN, now)

    def has(self, stage: Stage) -> bool:
        return stage in self._reached

    def age_s(self) -> float:
        """Seconds since the request was received."""
        return self._clock() - self._reached[Stage.RECEIVED]

    def decode_s(self) -> float:
        """Seconds since the first token; 0 before there is one."""
        first = self._reached.get(Stage.FIRST_TOKEN)
        return 0.0 if first is None else self._clock() - first

    @property
    def tpot_s(self) -> float | None:
        """Seconds of each token after the first, on average; None until two have come."""
        if self._last_token_at is None or self._num_tokens < 2:
            return None
        decode_s = self._last_token_at - self._reached[Stage.FIRST_TOKEN]
        return decode_s / (self._num_tokens - 1)

    def between_s(self, start: Stage, end: Stage) -> float | None:
        """Seconds from one stage to another; None until both are reached."""
        if start in self._reached and end in self._reached:
            return self._reached[end] - self._reached[start]
        return None
