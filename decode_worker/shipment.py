"""How far one prompt's keys and values are worth waiting for: pure, times on any one clock.

That is decided when the prefill worker has told its load, whenever it tells it anew, and when
about twice the time has passed that was predicted. So a worker that is slower than it said, or
hangs, costs a request no more than a few times what computing its prompt here would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from colm_serve.decode_worker.peer_speeds import PeerSpeeds
from colm_serve.decode_worker.prefill_plan import LocalLoad, PrefillOffer, ship_until
from colm_serve.transport.kv_frames import Frame, OpenFrame, WaitFrame

#: Nobody is late before. Shorter pauses say more of the threads on the way than of a worker, and
#: a busy one that lives has told its load in this time.
MIN_PATIENCE_S = 0.5


class Shipment:
    """What one call for the first `stop` tokens of a prompt is to bring, as far as is known by now.

    `until` is the token up to which to go on receiving, infinite where that is the end of the
    stream; `due` is when to `decide` again if nothing is heard before.
    """

    def __init__(
        self,
        stop: int,
        local_load: Callable[[], LocalLoad],
        speeds: PeerSpeeds,
        begin: float,
    ) -> None:
        """
        Args:
            local_load: what computing the tokens here would cost.
            speeds: of the link to the worker that is asked.
            begin: when it is asked.
        """
        self._stop = stop
        self._local_load = local_load
        self._speeds = speeds
        self._word: PrefillOffer | None = None
        self._predict(speeds.round_trip_s, begin)
        self.until = math.inf
        self.due = begin + _patience_s(speeds.round_trip_s)

    def note(self, frame: Frame, num_complete: int, now: float) -> None:
        """Decide anew if a frame tells the worker's load; the first `num_complete` are here."""
        match frame:
            case OpenFrame():
                self._hear(frame.num_cached_tokens, frame.num_queued_tokens, frame.tokens_per_s)
                self._predict(self._offer(num_complete).delay_s(num_complete, self._stop), now)
            case WaitFrame(progress=said) if said is not None:
                self._hear(said.num_computed_tokens, said.num_queued_tokens, said.tokens_per_s)
            case _:
                return
        self.decide(num_complete, now)

    def decide(self, num_complete: int, now: float) -> None:
        """Go on waiting, or for less, or not at all: by the worker's last word and the time."""
        offer = self._offer(num_complete)
        done_s = max(0.0, self._predicted_s - offer.delay_s(num_complete, self._stop))
        offer = replace(offer, late_s=max(0.0, now - self._begin - done_s))
        until = ship_until(num_complete, self._stop, self._local_load(), offer)
        # What is wanted whole is taken to its end frame, unless that alone is late.
        is_taken_whole = num_complete < until == self._stop
        self.until = math.inf if is_taken_whole else until
        self.due = now + _patience_s(offer.delay_s(num_complete, until))

    def _hear(self, num_cached: int, num_queued: int, tokens_per_s: float) -> None:
        self._word = PrefillOffer(num_cached, num_queued, tokens_per_s, None)

    def _offer(self, num_complete: int) -> PrefillOffer:
        word = self._word or PrefillOffer(0, 0, 0.0, None)
        word = replace(word, link_tokens_per_s=self._speeds.tokens.per_s)
        return word.having_come(num_complete, self._stop)

    def _predict(self, seconds: float, now: float) -> None:
        self._predicted_s, self._begin = seconds, now


def _patience_s(predicted_s: float) -> float:
    return max(MIN_PATIENCE_S, 2 * predicted_s)
