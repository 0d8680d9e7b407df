"""Where a simulated decode worker gets a prompt's keys and values from.

As `decode_worker.session` and `decode_worker.prompt_kv`: the same plan, made of the same speeds,
but once for a prompt, as `decode_worker.shipment` at the opening: nobody hangs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from colm_serve.core import KvLayout, Member
from colm_serve.decode_worker.prefill_plan import LocalLoad, is_asking_worthwhile, ship_until
from colm_serve.decode_worker.sequence import Stage
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.prefill import TracedPrefill, VirtualPrefillWorker
from colm_serve.simulate.sequence import VirtualSequence

#: Nothing is laid out: sizes are in the costs.
_LAYOUT = KvLayout(1, 1, 1, "simulated")


@dataclass
class KvFetcher:
    """Asks prefill workers for one sequence after another; `begin` goes on with what came."""

    clock: VirtualClock
    costs: WorkerCosts
    prefill: Mapping[Member, VirtualPrefillWorker]
    local_prefill_tokens: int
    local_load: Callable[[VirtualSequence], LocalLoad]
    begin: Callable[[VirtualSequence], object]

    def fetch(self, sequence: VirtualSequence) -> None:
        """Have shipped what is best shipped, then begin the sequence."""
        if sequence.num_missing > self.local_prefill_tokens:
            self._ask_from(sequence, 0)
        else:
            self.begin(sequence)

    def cancel(self, sequence: VirtualSequence) -> None:
        """Nobody waits for its keys and values any more."""
        if sequence.job is not None:
            worker, job = sequence.job
            sequence.job = None
            worker.cancel(job)

    def _ask_from(self, sequence: VirtualSequence, first: int) -> None:
        """Ask the first of its prefill workers, from this one on, that could be of use."""
        for index in range(first, len(sequence.prefill)):
            worker = self.prefill[sequence.prefill[index]]
            load = self.local_load(sequence)
            round_trip_s, link = 2 * self.costs.hop_s, self.costs.link_tokens_per_s
            if is_asking_worthwhile(sequence.num_missing, load, round_trip_s, link):
                arrival = self.clock.now + self.costs.hop_s
                self.clock.at(arrival, self._ask, sequence, worker, index)
                return
        self.begin(sequence)

    def _ask(self, sequence: VirtualSequence, worker: VirtualPrefillWorker, index: int) -> None:
        if sequence.stage is not Stage.AWAITING_KV:
            return
        request = TracedPrefill(
            request_id=sequence.request_id,
            # Only their number is looked at.
            tokens=(0,) * sequence.num_prefill,
            ship_from=sequence.num_computed,
            kv_identity=worker.member.kv_identity,
            layout=_LAYOUT,
            stream_id=0,
            ttft_s=sequence.ttft_s,
            blocks=sequence.blocks,
        )
        try:
            job, offer = worker.submit(request)
        except (ResourceExhausted, InvalidArgument):
            self._ask_from(sequence, index + 1)
            return
        load = self.local_load(sequence)
        stop = ship_until(sequence.num_computed, sequence.num_prefill, load, offer)
        if stop == sequence.num_computed:
            worker.cancel(job)
            self.begin(sequence)
            return
        sequence.job = worker, job
        worker.deliver(job, stop, partial(self._arrive, sequence, stop))

    def _arrive(self, sequence: VirtualSequence, stop: int) -> None:
        sequence.job = None
        sequence.num_shipped += stop - sequence.num_computed
        sequence.num_computed = stop
        self.begin(sequence)
