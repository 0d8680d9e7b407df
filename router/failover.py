"""Where the next attempt of a request goes, and what is learnt from one that has failed.

The ladder of a request whose decode worker fails: another decode worker, one that comes up in
time, and at last a standby, which is a prefill worker that goes on at level 1.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from colm_serve.config import ClusterConfig
from colm_serve.core import Membership
from colm_serve.errors import (
    ColmError,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from colm_serve.router.circuit_breaker import CircuitBreakers
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.lifecycle import Clock
from colm_serve.router.metrics import Metrics
from colm_serve.router.placing.decision import decide
from colm_serve.router.placing.policy import Placement, Policy, RequestFacts
from colm_serve.router.placing.snapshot import ClusterSnapshot
from colm_serve.router.retry_budget import RetryBudget
from colm_serve.router.running import RunningRequest

logger = logging.getLogger(__name__)


class Failover:
    """One router's; belongs to one event loop."""

    def __init__(
        self,
        config: ClusterConfig,
        view: ClusterView,
        policy: Policy,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        router = config.router
        self._view = view
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._standby_after_s = config.standby.after_s
        self._without_decode_since: dict[str, float] = {}
        self._max_attempts = router.max_attempts
        self._budget = RetryBudget(router.retry_share, router.max_concurrent, clock())
        self._breakers = CircuitBreakers(router.breaker_failures, router.breaker_open_s)

    def request_came(self) -> None:
        """It brings its share of a retry."""
        self._budget.add_request()

    def update_membership(self, membership: Membership) -> None:
        """Forget workers that have left."""
        self._breakers.keep(membership.members)

    def decide(self, running: RunningRequest) -> Placement:
        """Where a request goes now.

        A text that has begun takes a standby rather than none even if more than level 1 was asked
        for. Others take one only if level 1 is within their bounds.

        Raises:
            Unavailable, ResourceExhausted, InvalidArgument: as `Policy`.
        """
        now, salt = self._clock(), running.checked.cache_salt
        request = running.facts()
        try:
            placement = decide(self._unless_open, self._view, request, salt)
            self._without_decode_since.pop(request.variant, None)
        except Unavailable:
            since = self._without_decode_since.setdefault(request.variant, now)
            is_time = now - since >= self._standby_after_s
            if not (is_time and running.may_use_standby):
                raise
            placement = self._decide_standby(running)
        self._breakers.begin(placement.decode, now)
        return placement

    def succeeded(self, placement: Placement) -> None:
        """An attempt came to the request's end."""
        self._breakers.succeeded(placement.decode)

    async def failed(self, running: RunningRequest, placement: Placement, error: ColmError) -> None:
        """Learn from a failed attempt; returns when another may follow.

        Raises:
            ColmError: `error`, when it was the last attempt, or the retry budget is used up and
                the client has had nothing yet.
            DeadlineExceeded: the request's deadline passed before the budget allowed for more.
        """
        logger.warning("%s at %s: %s", running.request_id, placement.decode.worker_id, error)
        if isinstance(error, ResourceExhausted):
            running.refused_by |= {placement.decode}
        elif placement.decode not in running.failed_at:
            # A request that fails there again may be the cause itself.
            running.failed_at |= {placement.decode}
            if self._breakers.failed(placement.decode, self._clock()):
                logger.warning("%s: circuit opened", placement.decode.worker_id)
                self._metrics.circuit_opened()
        if isinstance(error, Unavailable):
            self._view.set_unreachable(placement.decode)
        if running.output.reason_to_end() is not None:
            return
        if running.num_attempts >= self._max_attempts:
            raise error
        await self._take_retry(running, error)
        self._metrics.failed_over()

    def _unless_open(self, request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
        """The policy, without the workers whose circuits are open."""
        now = self._clock()
        allowed = tuple(s for s in cluster.decode if self._breakers.allows(s.member, now))
        if len(allowed) < len(cluster.decode):
            cluster = replace(cluster, decode=allowed)
        return self._policy(request, cluster)

    def _decide_standby(self, running: RunningRequest) -> Placement:
        request = running.facts_at_level_1()
        try:
            standbys = self._view.standbys(request.prompt, running.checked.cache_salt)
            return self._unless_open(request, standbys)
        except InvalidArgument as error:
            # A decode worker holds more: the request is not wrong, it has to wait for one.
            raise Unavailable(f"no decode worker is reachable; at a standby: {error}") from error

    async def _take_retry(self, running: RunningRequest, error: ColmError) -> None:
        """Use up a retry of the budget; streams wait for theirs, other requests do not."""
        while not self._budget.take(self._clock()):
            if not running.is_resuming:
                self._metrics.retry_denied()
                raise error
            wait_s = self._budget.wait_s(self._clock())
            if wait_s >= running.remaining_s:
                raise DeadlineExceeded(f"no retry is left before the deadline: {error}") from error
            await asyncio.sleep(wait_s)
