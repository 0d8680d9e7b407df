"""Which decode workers have KV pages for a request. Pure."""

from __future__ import annotations

from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.placing.facts import RequestFacts
from colm_serve.router.placing.snapshot import ClusterSnapshot, DecodeState

RETRY_AFTER_S = 1.0


def with_room(request: RequestFacts, cluster: ClusterSnapshot) -> list[DecodeState]:
    """The decode workers that can hold the request now; raises as `Policy` says if none can."""
    if not cluster.decode:
        raise Unavailable("no decode worker is reachable")
    num_tokens = request.num_tokens
    large = [s for s in cluster.decode if s.pages_for(num_tokens) <= s.status.num_pages]
    if not large:
        limit = max(s.status.num_pages * s.status.page_size for s in cluster.decode)
        raise InvalidArgument(
            "max_tokens",
            request.max_tokens,
            f"prompt ({len(request.prompt)}) and output together up to {limit} tokens, "
            "the KV cache of a decode worker",
        )
    roomy = [
        state
        for state in large
        if state.pages_for(request.num_reserved_tokens(state)) <= state.num_free_pages
        and not (request.refused_by and state.member in request.refused_by)
    ]
    if not roomy:
        raise ResourceExhausted(
            f"no room for {num_tokens} tokens on any of {len(large)} decode "
            f"workers; the most free is {max(s.num_free_pages for s in large)} pages",
            RETRY_AFTER_S,
        )
    if not request.failed_at:
        return roomy
    return [s for s in roomy if s.member not in request.failed_at] or roomy
