"""Decides where new requests go; those for which there is no room wait here for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from colm_serve.config import ClusterConfig
from colm_serve.errors import ColmError, ResourceExhausted, TargetsMissed, Unavailable
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.failover import Failover
from colm_serve.router.fair_queue import MAX_ASIDE, FairQueue
from colm_serve.router.lifecycle import Clock
from colm_serve.router.overload import at_least_level, idle_level, retry_after_s
from colm_serve.router.placing.policy import Placement, Policy
from colm_serve.router.running import RunningRequest
from colm_serve.router.tenants import Tenant

#: Changes within so much time are one to those who wait: trying costs what placing does.
_LULL_S = 0.005


class _Turn:
    """A request that waits; `may_try` is set while it is the first of all.

    `trouble` is why it could not be placed when it was last tried.
    """

    def __init__(self, trouble: ColmError) -> None:
        self.trouble = trouble
        self.may_try = asyncio.Event()
        self.is_pushed_out = False


class Placer:
    """Places a model's requests in a fair order; at most `max_concurrent` of all at a time."""

    def __init__(
        self,
        config: ClusterConfig,
        view: ClusterView,
        policy: Policy,
        failover: Failover,
        tenants: Iterable[Tenant],
        placed: set[str],
        *,
        clock: Clock,
        patience_s: float,
    ) -> None:
        """Requests of each model wait for themselves, as their workers are not the others'.

        Args:
            placed: ids of the requests that are being served, of all models.
            patience_s: how long a request waits that has no target for its first token.
        """
        self._view = view
        self._policy = policy
        self._failover = failover
        self._clock = clock
        self._patience_s = patience_s
        self._max_concurrent = config.router.max_concurrent
        self._expected_output_tokens = config.decode.expected_output_tokens
        weights = {tenant.name: tenant.config.weight for tenant in tenants}
        self._queue: FairQueue[_Turn] = FairQueue(config.router.max_queued, weights)
        self._head: _Turn | None = None
        self._num_aside = 0
        self._placed = placed

    def num_waiting(self, tenant: Tenant) -> int:
        """Requests of a tenant that wait for room."""
        return self._queue.num_waiting(tenant.name)

    async def place(self, running: RunningRequest) -> Placement:
        """Where a request goes, once it has room and its turn has come.

        It waits while it can still have its first token in time at its lowest level.

        Raises:
            Unavailable: no decode worker came to be reachable.
            ResourceExhausted: there was no room in time, or too many wait.
            InvalidArgument: no worker could ever hold it.
        """
        if len(self._queue) == 0:
            try:
                placement = self._decide(running)
            except (Unavailable, ResourceExhausted) as error:
                return await self._wait(running, error)
            self._queue.serve_at_once(running.tenant.name, self._cost(running))
            return placement
        waiting = f"{len(self._queue)} requests wait for room"
        return await self._wait(running, ResourceExhausted(waiting))

    def leave(self, running: RunningRequest) -> None:
        """The request is over, and another may be placed."""
        self._placed.discard(running.request_id)
        self._view.announce()

    async def _wait(self, running: RunningRequest, trouble: ColmError) -> Placement:
        patience_s = self._worth_waiting_s(running)
        turn = _Turn(trouble)
        try:
            self._enter(running, turn)
            async with asyncio.timeout(patience_s):
                return await self._first_in_line(running, turn)
        except TimeoutError:
            waited = f"{turn.trouble}; waited {max(0.0, patience_s):.1f} s"
        finally:
            self._queue.remove(turn)
            self._wake_head()
        if isinstance(turn.trouble, Unavailable):
            raise Unavailable(waited)
        raise self._refusal(running, waited)

    async def _first_in_line(self, running: RunningRequest, turn: _Turn) -> Placement:
        while True:
            await turn.may_try.wait()
            if turn.is_pushed_out:
                raise self._refusal(running, "too many requests wait for room")
            change = self._view.change()
            try:
                placement = self._decide(running)
            except (Unavailable, ResourceExhausted) as error:
                turn.trouble = error
            else:
                self._queue.pop()
                return placement
            # One that lacks pages lets nobody by: else a large one might never have enough.
            with self._aside(turn) if isinstance(turn.trouble, TargetsMissed) else nullcontext():
                await change.wait()
                await asyncio.sleep(_LULL_S)
            running.refused_by = frozenset()

    @contextmanager
    def _aside(self, turn: _Turn) -> Iterator[None]:
        """Those behind may try: they may have looser targets, or none."""
        if self._num_aside >= MAX_ASIDE:
            yield
            return
        self._num_aside += 1
        self._queue.set_aside(turn)
        self._wake_head()
        try:
            yield
        finally:
            self._num_aside -= 1
            self._queue.recall(turn)
            self._wake_head()

    def _enter(self, running: RunningRequest, turn: _Turn) -> None:
        ttft_s = running.remaining_ttft_s
        due_s = running.remaining_s if ttft_s is None else ttft_s
        pushed_out = self._queue.push(
            running.tenant.name, self._cost(running), self._clock() + due_s, turn
        )
        if pushed_out is not None:
            pushed_out.is_pushed_out = True
            pushed_out.may_try.set()
        self._wake_head()

    def _wake_head(self) -> None:
        head = self._queue.head()
        if head is not self._head and self._head is not None and not self._head.is_pushed_out:
            self._head.may_try.clear()
        if head is not None:
            head.may_try.set()
        self._head = head

    def _decide(self, running: RunningRequest) -> Placement:
        is_placed = running.request_id in self._placed
        if not is_placed and len(self._placed) >= self._max_concurrent:
            raise ResourceExhausted(
                f"{len(self._placed)} requests are being served, the most this router takes"
            )
        request, salt = running.facts(), running.checked.cache_salt
        placement = self._failover.decide(running)
        if placement.decode.is_standby:
            running.is_brownout = True
        elif placement.level < request.max_level:
            cluster = self._view.candidates(request.prompt, salt, request.variant)
            running.is_brownout = placement.level < idle_level(self._policy, request, cluster)
        self._placed.add(running.request_id)
        return placement

    def _worth_waiting_s(self, running: RunningRequest) -> float:
        """Until when a first token can still come in time, at the lowest level."""
        if running.remaining_ttft_s is None:
            return min(self._patience_s, running.remaining_s)
        request, salt = running.facts(), running.checked.cache_salt
        cluster = self._view.candidates(request.prompt, salt, request.variant)
        if not cluster.decode:
            return min(self._patience_s, running.remaining_ttft_s)
        soonest = at_least_level(self._policy, request, cluster).prediction.ttft_s
        return running.remaining_ttft_s - soonest

    def _refusal(self, running: RunningRequest, message: str) -> ResourceExhausted:
        request, salt = running.facts(), running.checked.cache_salt
        cluster = self._view.candidates(request.prompt, salt, request.variant)
        if not cluster.decode:
            return ResourceExhausted(message)
        lowest = at_least_level(self._policy, request, cluster)
        num_workers = self._view.num_decode(request.variant)
        wait_s = retry_after_s(lowest, cluster, len(self._queue), num_workers)
        return ResourceExhausted(message, wait_s)

    def _cost(self, running: RunningRequest) -> float:
        """Tokens that serving a request is thought to take; those of a heavy class count less."""
        max_tokens = running.checked.sampling.max_tokens
        num_tokens = len(running.checked.prompt) + min(max_tokens, self._expected_output_tokens)
        return num_tokens / running.checked.weight
