"""Keeps the measurements that plans are made of, and makes them for one request at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable

from colm_serve.core import TransferCost
from colm_serve.decode_worker.peer_speeds import SpeedTable, StreamMeter
from colm_serve.decode_worker.prefill_plan import (
    LocalLoad,
    PrefillOffer,
    is_asking_worthwhile,
    ship_until,
)
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.transport.kv_frames import OpenFrame

logger = logging.getLogger(__name__)


class PrefillPlanner:
    """Decides, per request and prefill worker, what is shipped and what is computed here."""

    def __init__(self, local_load: Callable[[Sequence], LocalLoad], num_layers: int) -> None:
        """`local_load` tells what computing the tokens that a sequence lacks would cost here."""
        self._local_load = local_load
        self._num_layers = num_layers
        self._speeds = SpeedTable()

    def is_asking_worthwhile(self, address: str, sequence: Sequence) -> bool:
        """Whether a call could be of use, whatever it is answered."""
        speeds = self._speeds.of(address)
        load = self._local_load(sequence)
        num_tokens = sequence.num_missing
        link = speeds.tokens.per_s
        return is_asking_worthwhile(num_tokens, load, speeds.round_trip_s, link)

    @property
    def transfer_cost(self) -> TransferCost:
        """Of a call to a prefill worker, whichever it is."""
        return self._speeds.overall

    def meter(self, address: str, now: float) -> StreamMeter:
        """What a call that is made `now` is to be measured by."""
        return StreamMeter(self._speeds.of(address), self._num_layers, now)

    def ship_until(self, address: str, sequence: Sequence, opening: OpenFrame) -> int:
        """The token up to which to go on receiving, now that the worker has told its load."""
        offer = PrefillOffer(
            num_cached_tokens=opening.num_cached_tokens,
            num_queued_tokens=opening.num_queued_tokens,
            tokens_per_s=opening.tokens_per_s,
            link_tokens_per_s=self._speeds.of(address).tokens.per_s,
        )
        load = self._local_load(sequence)
        stop = ship_until(sequence.num_computed, sequence.num_prefill, load, offer)
        logger.debug(
            "request %s: tokens [%d, %d) are shipped up to %d: %s, %s",
            sequence.request.request_id, sequence.num_computed, sequence.num_prefill, stop,
            offer, load,
        )  # fmt: skip
        return stop
