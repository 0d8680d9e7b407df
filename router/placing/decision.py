"""Where a request goes, decided on few workers first and on more only before it is refused."""

from __future__ import annotations

from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.placing.pace import pace_of
from colm_serve.router.placing.policy import Placement, Policy, RequestFacts


def decide(policy: Policy, view: ClusterView, request: RequestFacts, cache_salt: str) -> Placement:
    """Place a request on one of its candidates, or else where there is the most room.

    Raises as `Policy` does, and only for what holds of every worker.
    """
    pace = pace_of(request.tpot_s)
    candidates = view.candidates(request.prompt, cache_salt, request.variant, pace)
    try:
        return policy(request, candidates)
    except (Unavailable, ResourceExhausted, InvalidArgument):
        if len(candidates.decode) == view.num_decode(request.variant):
            raise
    return policy(request, view.roomiest(request.prompt, cache_salt, request.variant))
