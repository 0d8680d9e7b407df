"""The router on the virtual clock: as `router.router`, the same decisions without the calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from colm_serve.config import ClusterConfig, heavier_tpot_s
from colm_serve.core import Member, Membership
from colm_serve.errors import ColmError, InvalidConfig, ResourceExhausted
from colm_serve.router.admission import Admission
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.overload import poll_interval_s
from colm_serve.router.placing.facts import Placement
from colm_serve.router.placing.level_moves import INTERVAL_S
from colm_serve.router.placing.policy import make_policy
from colm_serve.router.tenants import ANYBODY
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.decode import VirtualDecodeWorker
from colm_serve.simulate.level_loop import VirtualLevelLoop
from colm_serve.simulate.outcomes import ClassOutcomes
from colm_serve.simulate.placer import VirtualPlacer
from colm_serve.simulate.prefill import VirtualPrefillWorker
from colm_serve.simulate.running import VirtualRequest
from colm_serve.simulate.sequence import VirtualSequence
from colm_serve.simulate.trace import TracedRequest

KV_IDENTITY = "simulated"


class VirtualRouter:
    """Takes the requests of a trace as they arrive, until the last one has ended."""

    def __init__(
        self,
        config: ClusterConfig,
        clock: VirtualClock,
        decode: Mapping[Member, VirtualDecodeWorker],
        prefill: Mapping[Member, VirtualPrefillWorker],
        *,
        num_levels: int,
        hop_s: float,
    ) -> None:
        self.ended_at = 0.0
        self.outcomes = {name: ClassOutcomes(sla) for name, sla in config.sla_classes.items()}
        self._config = config
        self._heavier_tpot_s = heavier_tpot_s(config.sla_classes)
        self._clock = clock
        self._decode = decode
        self._workers: dict[Member, VirtualDecodeWorker | VirtualPrefillWorker] = {
            **decode,
            **prefill,
        }
        self._poll_interval_s = poll_interval_s(config.router.status_interval_s, len(self._workers))
        self._num_levels = num_levels
        self._hop_s = hop_s
        max_under_way = 2 * config.router.max_concurrent + config.router.max_queued
        self._admission = Admission(max_under_way, (ANYBODY,), lambda: clock.now)
        self._view = ClusterView(KV_IDENTITY, config.decode.page_size)
        policy = make_policy(config.router)
        self._placer = VirtualPlacer(config, self._view, policy, clock, self._place, self._refuse)
        is_adaptive = config.router.policy != "fixed_level"
        self._moves_per_s = config.router.level_moves_per_s if is_adaptive else 0.0
        self._levels = VirtualLevelLoop(self._view, decode, self._moves_per_s)
        self._running: dict[str, OrderedDict[VirtualRequest, None]] = {
            name: OrderedDict() for name in config.sla_classes
        }
        self._num_arrived = 0
        self._is_trace_over = False

    def start(self, requests: Iterator[TracedRequest]) -> None:
        """Know all workers, and set the clock for the first request and the polls to come."""
        self._view.apply(Membership(1, tuple(self._workers)))
        for index, member in enumerate(self._workers):
            self._ask(member)
            first = self._clock.now + self._poll_interval_s * (index + 1) / len(self._workers)
            self._clock.at(first, self._poll, member)
        if self._moves_per_s:
            self._clock.at(self._clock.now + INTERVAL_S, self._move_levels)
        self._expect(requests)

    @property
    def num_level_moves(self) -> int:
        return self._levels.num_moves

    @property
    def _is_over(self) -> bool:
        return self._is_trace_over and not any(self._running.values())

    def _poll(self, member: Member) -> None:
        if not self._is_over:
            self._ask(member)
            self._placer.changed()
            self._clock.at(self._clock.now + self._poll_interval_s, self._poll, member)

    def _move_levels(self) -> None:
        if not self._is_over:
            self._levels.move(self._clock.now)
            self._clock.at(self._clock.now + INTERVAL_S, self._move_levels)

    def _ask(self, member: Member) -> None:
        counted = self._view.counted(member)
        self._view.set_status(member, self._workers[member].status(), counted)

    def _expect(self, requests: Iterator[TracedRequest]) -> None:
        traced = next(requests, None)
        if traced is None:
            self._is_trace_over = True
        else:
            self._clock.at(traced.arrival_s, self._arrive, traced, requests)

    def _arrive(self, traced: TracedRequest, requests: Iterator[TracedRequest]) -> None:
        self._expect(requests)
        self._num_arrived += 1
        name = traced.sla_class or self._config.default_sla_class
        sla = self._config.sla_classes.get(name)
        if sla is None:
            allowed = f"one of {sorted(self._config.sla_classes)}"
            raise InvalidConfig("sla_class of a request in the trace", name, allowed)
        try:
            ticket = self._admission.begin(ANYBODY)
        except ResourceExhausted:
            self.outcomes[name].num_refused += 1
            return
        request_id, num_prompt = str(self._num_arrived), traced.num_prompt_tokens
        request = VirtualRequest(
            request_id,
            traced,
            name,
            sla,
            self._num_levels,
            num_prompt,
            ticket,
            self._heavier_tpot_s.get(name),
        )
        self._watch_deadline(request)
        self._placer.enter(request)

    def _watch_deadline(self, request: VirtualRequest) -> None:
        """Requests of one class are due in the order of their arrival: one event at a time."""
        others = self._running[request.sla_name]
        others[request] = None
        if len(others) == 1:
            self._clock.at(request.deadline, self._end_late, request.sla_name)

    def _end_late(self, sla_name: str) -> None:
        others = self._running[sla_name]
        while others:
            request = next(iter(others))
            if request.deadline > self._clock.now:
                self._clock.at(request.deadline, self._end_late, sla_name)
                return
            if request.sequence is not None and request.placement is not None:
                self._decode[request.placement.decode].cancel(request.sequence)
            self.outcomes[sla_name].num_late += 1
            self._forget(request)

    def _place(self, request: VirtualRequest, placement: Placement) -> None:
        request.placement, request.level = placement, placement.level
        request.num_attempts += 1
        work = request.work(placement)
        self._view.place(request.request_id, placement, work, request.prompt)
        request.forget_prompt()
        self._clock.at(self._clock.now + self._hop_s, self._admit, request)

    def _admit(self, request: VirtualRequest) -> None:
        """The call has reached the decode worker."""
        placement = request.placement
        if placement is None:
            return
        sequence = VirtualSequence(
            request_id=request.request_id,
            blocks=request.all_blocks(),
            num_prompt=request.num_prompt,
            max_tokens=request.traced.num_output_tokens,
            level=placement.level,
            prefill=placement.prefill,
            ttft_s=request.remaining_ttft_s(self._clock.now),
            on_end=lambda sequence: self._finish(request, sequence),
            on_prompt=lambda: self._view.prefilled(request.request_id, placement),
        )
        request.sequence = sequence
        try:
            self._decode[placement.decode].admit(sequence)
        except ColmError as error:
            self._try_elsewhere(request, placement, error)
        else:
            self._view.admitted(request.request_id, placement)
            self._levels.add(placement.decode, request)

    def _try_elsewhere(
        self, request: VirtualRequest, placement: Placement, error: ColmError
    ) -> None:
        self._view.release(request.request_id, placement)
        request.placement = request.sequence = None
        request.refused_by |= {placement.decode}
        is_last = request.num_attempts >= self._config.router.max_attempts
        if is_last or not isinstance(error, ResourceExhausted):
            self._refuse(request)
        else:
            self._placer.enter(request)

    def _finish(self, request: VirtualRequest, sequence: VirtualSequence) -> None:
        assert sequence.first_token_at is not None, "an end without a first token"
        num_tokens, now = sequence.num_output, self._clock.now
        tpot_s = (now - sequence.first_token_at) / (num_tokens - 1) if num_tokens > 1 else None
        ttft_s = sequence.first_token_at + self._hop_s - request.traced.arrival_s
        outcomes = self.outcomes[request.sla_name]
        outcomes.finished(ttft_s, tpot_s, num_tokens, sequence.mean_level)
        self._forget(request)

    def _refuse(self, request: VirtualRequest) -> None:
        self.outcomes[request.sla_name].num_refused += 1
        self._forget(request)

    def _forget(self, request: VirtualRequest) -> None:
        self.ended_at = self._clock.now
        del self._running[request.sla_name][request]
        if request.placement is not None:
            self._view.release(request.request_id, request.placement)
            self._levels.remove(request.placement.decode, request)
            request.placement = request.sequence = None
        self._admission.end(request.ticket)
        self._placer.leave(request)
