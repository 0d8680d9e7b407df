"""The mildest codec with which shipping KV is no slower than computing it: pure, no clock.

A stream's transfer hides behind its compute as long as the link carries a token's KV in the time
that the prefill worker takes for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from colm_serve.transport.kv_frames import EndFrame, Frame, KvFrame, OpenFrame

#: Shorter transfers say more about the machine's other business than about the link.
MIN_TRANSFER_BYTES = 1024 * 1024
#: A transfer that kept up shows no bound; so much more is believed of the link after each.
_GROWTH = 1.05
_MAX_LINKS = 256


@dataclass
class Transfer:
    """One stream as its receiver sees it come: `num_bytes` in `transfer_s` after its first frame
    of K and V; the sender took `compute_s` to make those of `num_tokens` tokens.
    """

    num_tokens: int
    num_bytes: int = 0
    transfer_s: float = 0.0
    compute_s: float = 0.0
    _begin: float | None = None

    def take(self, frame: Frame, num_bytes: int, now: float) -> None:
        """Count a frame that came at `now` seconds of some clock, with `num_bytes` of payload."""
        match frame:
            case OpenFrame():
                self.num_tokens -= frame.num_cached_tokens
            case KvFrame():
                if self._begin is None:
                    self._begin = now
                    return
                self.num_bytes += num_bytes
                self.transfer_s = now - self._begin
            case EndFrame():
                self.compute_s = frame.compute_s


@dataclass(frozen=True)
class Link:
    """What the way from a prefill worker carries, and what the worker computes."""

    bytes_per_s: float
    tokens_per_s: float

    @classmethod
    def seen(cls, transfer: Transfer, before: Link | None) -> Link:
        """What a transfer shows; one slower than its compute shows the link's bound."""
        bytes_per_s = transfer.num_bytes / transfer.transfer_s
        if before is not None and transfer.transfer_s <= transfer.compute_s:
            bytes_per_s = max(bytes_per_s, _GROWTH * before.bytes_per_s)
        return cls(bytes_per_s, transfer.num_tokens / transfer.compute_s)


def mildest_hidden(bytes_per_token: Mapping[str, float], link: Link) -> str:
    """The first codec whose transfer hides behind compute, the smallest one if none does.

    Args:
        bytes_per_token: of each codec to choose from, the mildest first.
    """
    for name, num_bytes in bytes_per_token.items():
        if num_bytes * link.tokens_per_s <= link.bytes_per_s:
            return name
    return min(bytes_per_token, key=bytes_per_token.__getitem__)


class CodecChoice:
    """Chooses for each prefill worker by what its last transfers showed; at first the mildest."""

    def __init__(self, bytes_per_token: Mapping[str, float]) -> None:
        self._bytes_per_token = bytes_per_token
        self._links: OrderedDict[str, Link] = OrderedDict()

    def choose(self, address: str) -> str:
        link = self._links.get(address)
        if link is None:
            return next(iter(self._bytes_per_token))
        return mildest_hidden(self._bytes_per_token, link)

    def learn(self, address: str, transfer: Transfer) -> None:
        """Take a transfer into account, unless it was too small to say anything."""
        if transfer.num_bytes < MIN_TRANSFER_BYTES or not transfer.compute_s:
            return
        self._links[address] = Link.seen(transfer, self._links.get(address))
        self._links.move_to_end(address)
        if len(self._links) > _MAX_LINKS:
            self._links.popitem(last=False)
