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
    large = [s for s in cluster.decode if num_pages(request.num_tokens, s) <= s.status.num_pages]
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
        if state.member not in request.refused_by
        and num_pages(request.num_reserved_tokens(state), state) <= num_free_pages(state)
    ]
    if not roomy:
        raise ResourceExhausted(
            f"no room for {request.num_tokens} tokens on any of {len(large)} decode "
            f"workers; the most free is {max(map(num_free_pages, large))} pages",
            RETRY_AFTER_S,
        )
    return [s for s in roomy if s.member not in request.failed_at] or roomy


def num_pages(num_tokens: int, state: DecodeState) -> int:
    return -(-num_tokens // state.status.page_size)


def num_free_pages(state: DecodeState) -> int:
    """Free pages once the work on its way has its own."""
    expected = state.status.expected_output_tokens
    taken = sum(num_pages(w.num_reserved_tokens(expected), state) for w in state.outstanding)
    return max(0, state.status.num_free_pages - taken)
