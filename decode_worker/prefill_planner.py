"""Keeps the measurements that plans are made of, and makes them for one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from colm_serve.core import TransferCost
from colm_serve.decode_worker.peer_speeds import SpeedTable, StreamMeter
from colm_serve.decode_worker.prefill_plan import LocalLoad, is_asking_worthwhile
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.decode_worker.shipment import Shipment


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

    def shipment(self, address: str, sequence: Sequence, now: float) -> Shipment:
        """What a call that is made `now` is waited for."""
        local_load = partial(self._local_load, sequence)
        return Shipment(sequence.num_prefill, local_load, self._speeds.of(address), now)
