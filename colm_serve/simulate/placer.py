"""Where requests go and who waits: as `router.placer`, without tasks to wait in."""

from __future__ import annotations

from collections.abc import Callable

from colm_serve.config import ClusterConfig
from colm_serve.errors import InvalidArgument, ResourceExhausted, TargetsMissed, Unavailable
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.fair_queue import MAX_ASIDE, FairQueue
from colm_serve.router.overload import PATIENCE_S, at_least_level
from colm_serve.router.placing.decision import decide
from colm_serve.router.placing.facts import Placement
from colm_serve.router.placing.policy import Policy
from colm_serve.router.tenants import ANYBODY
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.running import VirtualRequest

#: Changes within so much time of each other are one to those who wait.
_LULL_S = 0.001


class VirtualPlacer:
    """Places requests, at most `max_concurrent` of them at a time, in a fair order.

    Args:
        place: called with a request and where it goes.
        refuse: called with a request for which there was no room in time.
    """

    def __init__(
        self,
        config: ClusterConfig,
        view: ClusterView,
        policy: Policy,
        clock: VirtualClock,
        place: Callable[[VirtualRequest, Placement], object],
        refuse: Callable[[VirtualRequest], object],
    ) -> None:
        self._view = view
        self._policy = policy
        self._clock = clock
        self._place = place
        self._refuse = refuse
        self._max_concurrent = config.router.max_concurrent
        self._expected_output_tokens = config.decode.expected_output_tokens
        weights = {ANYBODY.name: ANYBODY.config.weight}
        self._queue: FairQueue[VirtualRequest] = FairQueue(config.router.max_queued, weights)
        self._waiting: set[VirtualRequest] = set()
        self._placed: set[VirtualRequest] = set()
        self._is_change_due = False

    def enter(self, request: VirtualRequest) -> None:
        """Place a request, or let it wait while it can still have its first token in time."""
        if self._waiting:
            self._wait(request)
            self.changed()
            return
        try:
            placement = self._decide(request)
        except (Unavailable, ResourceExhausted):
            self._wait(request)
        except InvalidArgument:
            self._refuse(request)
        else:
            self._queue.serve_at_once(ANYBODY.name, self._cost(request))
            self._place(request, placement)

    def leave(self, request: VirtualRequest) -> None:
        """The request is over, and another may be placed."""
        self._placed.discard(request)
        self._forget(request)
        self.changed()

    def changed(self) -> None:
        """Something is otherwise that a decision may depend on."""
        if self._waiting and not self._is_change_due:
            self._is_change_due = True
            self._clock.at(self._clock.now + _LULL_S, self._try_waiting)

    def _try_waiting(self) -> None:
        self._is_change_due = False
        aside: list[VirtualRequest] = []
        while (head := self._queue.head()) is not None:
            head.refused_by = frozenset()
            try:
                placement = self._decide(head)
            except TargetsMissed:
                if len(aside) == MAX_ASIDE:
                    break
                self._queue.set_aside(head)
                aside.append(head)
            except (Unavailable, ResourceExhausted):
                break
            except InvalidArgument:
                self._give_up(head)
            else:
                self._waiting.discard(self._queue.pop())
                self._place(head, placement)
        for request in aside:
            self._queue.recall(request)

    def _wait(self, request: VirtualRequest) -> None:
        now = self._clock.now
        try:
            patience_s = self._worth_waiting_s(request)
        except InvalidArgument:
            patience_s = 0.0
        if patience_s <= 0:
            self._refuse(request)
            return
        ttft_s = request.remaining_ttft_s(now)
        due = request.deadline if ttft_s is None else now + ttft_s
        pushed_out = self._queue.push(ANYBODY.name, self._cost(request), due, request)
        self._waiting.add(request)
        self._clock.at(now + patience_s, self._give_up, request)
        if pushed_out is not None:
            self._give_up(pushed_out)

    def _give_up(self, request: VirtualRequest) -> None:
        if request in self._waiting:
            self._forget(request)
            self._refuse(request)

    def _forget(self, request: VirtualRequest) -> None:
        self._waiting.discard(request)
        self._queue.remove(request)

    def _decide(self, request: VirtualRequest) -> Placement:
        if len(self._placed) - (request in self._placed) >= self._max_concurrent:
            raise ResourceExhausted(f"{len(self._placed)} requests are being served")
        placement = decide(self._policy, self._view, request.facts(self._clock.now), "")
        self._placed.add(request)
        return placement

    def _worth_waiting_s(self, request: VirtualRequest) -> float:
        """Until when a first token can still come in time, at the lowest level."""
        ttft_s = request.remaining_ttft_s(self._clock.now)
        if ttft_s is None:
            return min(PATIENCE_S, request.deadline - self._clock.now)
        facts = request.facts(self._clock.now)
        cluster = self._view.candidates(facts.prompt, "")
        return ttft_s - at_least_level(self._policy, facts, cluster).prediction.ttft_s

    def _cost(self, request: VirtualRequest) -> float:
        """Tokens that serving a request is thought to take; those of a heavy class count less."""
        max_tokens = min(request.traced.num_output_tokens, self._expected_output_tokens)
        return (request.num_prompt + max_tokens) / request.sla.weight
