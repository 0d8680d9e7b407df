"""What recent streams tell of the links to prefill workers: pure, a bounded table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from colm_serve.core import TransferCost
from colm_serve.latency.rate import Rate

MAX_PEERS = 256
#: What a link's speeds are taken from: so many calls, and so many tokens, about.
_MEMORY_CALLS, _MEMORY_TOKENS = 10, 4096


def _calls() -> Rate:
    return Rate(_MEMORY_CALLS)


def _tokens() -> Rate:
    return Rate(_MEMORY_TOKENS)


@dataclass
class PeerSpeeds:
    """One prefill worker's link: calls opened a second, tokens received a second."""

    openings: Rate = field(default_factory=_calls)
    tokens: Rate = field(default_factory=_tokens)

    @property
    def round_trip_s(self) -> float:
        """From a call to its opening frame; 0 if unknown."""
        per_s = self.openings.per_s
        return 1 / per_s if per_s else 0.0


class StreamMeter:
    """Measures one link by a stream whose frames of KV tell when there was something to send."""

    def __init__(self, speeds: PeerSpeeds, num_layers: int, begin: float) -> None:
        """`begin` is when the call was made, on the clock of the other times."""
        self._speeds = speeds
        self._num_layers = num_layers
        self._last = begin
        self._num_cached_tokens = 0
        self._next = (0, 0)

    def opened(self, num_cached_tokens: int, now: float) -> None:
        self._speeds.openings.add(1, now - self._last)
        self._num_cached_tokens, self._last = num_cached_tokens, now

    def received(self, layer: int, start: int, num_tokens: int, now: float) -> None:
        """A frame is here; its time counts if it did not wait for any compute.

        Neither does a cached one, nor the second of a layer that was too large for one frame.
        """
        stop = start + num_tokens
        if stop <= self._num_cached_tokens or (layer, start) == self._next:
            self._speeds.tokens.add(num_tokens / self._num_layers, now - self._last)
        self._last, self._next = now, (layer, stop)


class SpeedTable:
    """The speeds of the `max_peers` addresses asked last; `overall` takes them together."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._peers: OrderedDict[str, PeerSpeeds] = OrderedDict()

    @property
    def overall(self) -> TransferCost:
        peers = self._peers.values()
        return TransferCost(
            call_s=_each_s(speeds.openings for speeds in peers),
            token_s=_each_s(speeds.tokens for speeds in peers),
        )

    def of(self, address: str) -> PeerSpeeds:
        speeds = self._peers.setdefault(address, PeerSpeeds())
        self._peers.move_to_end(address)
        if len(self._peers) > self._max_peers:
            self._peers.popitem(last=False)
        return speeds


def _each_s(rates: Iterable[Rate]) -> float:
    """Seconds that one of what they measure takes; 0 if nothing has been measured."""
    amount = seconds = 0.0
    for rate in rates:
        amount += rate.amount
        seconds += rate.seconds
    return seconds / amount if amount else 0.0
