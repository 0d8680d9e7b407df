"""What load does to a request: the level it costs, how long waiting is worth it. Pure.

Answered by the policy itself, on the same workers as they would be otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from colm_serve.router.placing.policy import Placement, Policy, RequestFacts
from colm_serve.router.placing.snapshot import ClusterSnapshot, DecodeState, PrefillState

#: How long a new request waits for a decode worker to appear: more than a restart takes.
PATIENCE_S = 10.0
#: More than this is worth no request's delay: with many workers each is asked less often.
MAX_POLLS_PER_S = 200.0
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


def poll_interval_s(interval_s: float, num_workers: int) -> float:
    """Seconds from one question for a worker's status to the next."""
    return max(interval_s, num_workers / MAX_POLLS_PER_S)


def idle_level(policy: Policy, request: RequestFacts, cluster: ClusterSnapshot) -> int:
    """The level that the request would get if these workers had nothing else to do."""
    decode = tuple(_roomy(_idle(state), request) for state in cluster.decode)
    idle = ClusterSnapshot(decode, tuple(map(_empty, cluster.prefill)))
    return _served(policy, replace(request, age_s=0.0), idle).level


def at_least_level(policy: Policy, request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
    """What the request would get at its lowest level, beside all that runs, if it had room."""
    lowest = replace(request, max_level=request.min_level, ttft_s=None, tpot_s=None)
    decode = tuple(_roomy(state, request) for state in cluster.decode)
    return _served(policy, lowest, replace(cluster, decode=decode))


def retry_after_s(
    placement: Placement, cluster: ClusterSnapshot, num_ahead: int, num_workers: int
) -> float:
    """Seconds until as many requests have ended as wait already, and one more.

    Args:
        placement: at one of the cluster's decode workers, whose load stands for that of all.
        num_workers: decode workers there are.
    """
    state = next(s for s in cluster.decode if s.member == placement.decode)
    num_rows = sum(state.status.num_running) + len(state.outstanding)
    row_s = state.status.expected_output_tokens * placement.prediction.tpot_s
    seconds = (num_ahead + 1) * row_s / max(1, num_rows * num_workers)
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, seconds))


def _served(policy: Policy, request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
    """The policy's placement; it refuses nothing that has begun."""
    begun = replace(request, is_begun=True, refused_by=frozenset(), failed_at=frozenset())
    return policy(begun, cluster)


def _roomy(state: DecodeState, request: RequestFacts) -> DecodeState:
    # Each request on its way takes no more than all pages, and this one no more than its tokens.
    num_pages = state.status.num_pages * (1 + len(state.outstanding)) + request.num_tokens
    status = replace(state.status, num_pages=num_pages, num_free_pages=num_pages)
    return replace(state, status=status, tpot_s=None, outlook=None)


def _idle(state: DecodeState) -> DecodeState:
    status = replace(
        state.status,
        num_waiting=0,
        num_running=(0,) * state.status.num_levels,
        num_attended=(),
    )
    return replace(state, status=status, outstanding=(), placed=())


def _empty(state: PrefillState) -> PrefillState:
    status = replace(state.status, num_running=0, num_waiting=0, num_queued_tokens=0, queued_s=0.0)
    return replace(state, status=status, num_outstanding_tokens=0)
