"""How much of a prompt to have shipped and how much to compute here: pure, from measured speeds.

A prefill worker sends what it has cached at once; the rest comes once the prompts before it and it
itself have been computed, and as fast as the link allows. What is computed here follows what is
shipped, since it attends to it, and every running row waits while it is.

The cost of a plan is the delay that it means to this request and to the running rows together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LocalLoad:
    """What computing here would cost: `num_queued_tokens` of other prompts come first.

    `num_rows` run; for the next ones to come, there is taken to be one at least.
    """

    tokens_per_s: float | None
    num_queued_tokens: int
    num_rows: int

    def delay_s(self, num_tokens: int) -> float:
        """To the request and the running rows together."""
        if num_tokens == 0:
            return 0.0
        if not self.tokens_per_s:
            return math.inf
        waiting = self.num_queued_tokens + num_tokens
        return (waiting + max(1, self.num_rows) * num_tokens) / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class PrefillOffer:
    """What a prefill worker has said of itself, and its link's speed; None if not known yet.

    A speed of 0 is not known either. What has still to come is expected to be late by as much
    again as it is by now: `late_s`.
    """

    num_cached_tokens: int
    num_queued_tokens: int
    tokens_per_s: float
    link_tokens_per_s: float | None
    late_s: float = 0.0

    def delay_s(self, start: int, stop: int) -> float:
        """Until the keys and values of tokens [start, stop) are here."""
        if stop == start:
            return 0.0
        link_s = (stop - start) / self.link_tokens_per_s if self.link_tokens_per_s else 0.0
        return self.late_s + max(link_s, self._compute_s(stop))

    def _compute_s(self, stop: int) -> float:
        num_new = stop - self.num_cached_tokens
        if num_new <= 0 or not self.tokens_per_s:
            return 0.0
        return (self.num_queued_tokens + num_new) / self.tokens_per_s

    def even_point(self, start: int) -> float:
        """The `stop` from which on computing takes longer than sending, or the other way round."""
        if not self.link_tokens_per_s or not self.tokens_per_s:
            return start
        compute, link = 1 / self.tokens_per_s, 1 / self.link_tokens_per_s
        # Two speeds that differ may have one reciprocal.
        if link == compute:
            return start
        ahead = (self.num_queued_tokens - self.num_cached_tokens) * compute
        return (ahead + start * link) / (link - compute)

    def having_come(self, num_tokens: int, stop: int) -> PrefillOffer:
        """The same once the first `num_tokens` of `stop` are here.

        The queue has shrunk with what is left of the prompt: they have equal shares of each pass.
        """
        num_left, num_cached = (
            stop - self.num_cached_tokens,
            max(self.num_cached_tokens, num_tokens),
        )
        if num_left <= 0:
            return self
        num_queued = self.num_queued_tokens * (stop - num_cached) // num_left
        return replace(self, num_cached_tokens=num_cached, num_queued_tokens=num_queued)


def ship_until(start: int, stop: int, local: LocalLoad, offer: PrefillOffer) -> int:
    """The token up to which those missing, [start, stop), are best shipped; the rest is computed.

    Where a speed that matters is unknown, all are shipped, unless that is late by more than
    computing them takes. So are they where it makes no difference.
    """
    if not offer.tokens_per_s and offer.num_cached_tokens < stop:
        return stop if offer.late_s <= local.delay_s(stop - start) else start
    # Costs are linear between these, so that no other point is better than all of them.
    candidates = {start, start + 1, stop, offer.num_cached_tokens, offer.num_cached_tokens + 1}
    even = offer.even_point(start)
    if start <= even <= stop:
        candidates |= {math.floor(even), math.ceil(even)}
    allowed = [s for s in candidates if start <= s <= stop]
    return min(allowed, key=lambda s: (offer.delay_s(start, s) + local.delay_s(stop - s), -s))


def is_asking_worthwhile(
    num_tokens: int, local: LocalLoad, round_trip_s: float, link_tokens_per_s: float | None
) -> bool:
    """Whether a prefill worker could be of use at all: with everything cached and nothing to do."""
    link_s = num_tokens / link_tokens_per_s if link_tokens_per_s else 0.0
    return round_trip_s + link_s <= local.delay_s(num_tokens)
