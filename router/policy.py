"""Which workers serve a request, and at which level. Pure: values in, a placement out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from colm_serve.core import Member
from colm_serve.errors import InvalidArgument, ResourceExhausted, Unavailable
from colm_serve.router.latency_model import Prediction, predict, queue_s
from colm_serve.router.snapshot import ClusterSnapshot, DecodeState, PrefillState

#: The prefill worker to ask, and its spares.
MAX_PREFILL_WORKERS = 3
RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class RequestFacts:
    """What a policy may know of a request.

    `refused_by` had no room for it a moment ago; at `failed_at` it broke off, so that these
    come last.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    min_level: int
    max_level: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    refused_by: frozenset[Member] = frozenset()
    failed_at: frozenset[Member] = frozenset()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens

    def num_reserved_tokens(self, state: DecodeState) -> int:
        """What the decode worker reserves pages for at once."""
        return len(self.prompt) + min(self.max_tokens, state.status.expected_output_tokens)


@dataclass(frozen=True)
class Placement:
    """Where a request goes: a decode worker, prefill workers in order, a level."""

    decode: Member
    prefill: tuple[Member, ...]
    level: int
    prediction: Prediction


class Policy(Protocol):
    """The seam: anything that decides placements."""

    def __call__(self, request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
        """Place a request.

        Raises:
            Unavailable: no decode worker is reachable.
            ResourceExhausted: none has room now.
            InvalidArgument: none could hold the request even if it were idle.
        """


def highest_level_least_finish(request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
    """The highest level at which every target holds; there, the least predicted finish.

    Where no level in the bounds keeps the targets, the lowest is served: a late answer from a
    small model before none at all.
    """
    prefill = order_prefill(cluster)
    first = prefill[0] if prefill else None
    choices: list[tuple[tuple[float, ...], str, Placement]] = []
    for state in with_room(request, cluster):
        level, prediction, holds = choose_level(request, state, first)
        rank = (-level, prediction.finish_s(request.max_tokens), len(state.outstanding))
        placement = Placement(state.member, tuple(p.member for p in prefill), level, prediction)
        choices.append(((float(not holds), *rank), state.member.worker_id, placement))
    return min(choices, key=lambda choice: choice[:2])[2]


def choose_level(
    request: RequestFacts, state: DecodeState, prefill: PrefillState | None
) -> tuple[int, Prediction, bool]:
    """A level for the request on one worker, what it gets there, and if the targets hold."""

    def at(level: int) -> Prediction:
        return predict(
            state,
            prefill,
            level=level,
            num_prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
        )

    for level in range(request.max_level, request.min_level - 1, -1):
        prediction = at(level)
        if keeps_targets(request, state, prediction):
            return level, prediction, True
    return request.min_level, at(request.min_level), False


def keeps_targets(request: RequestFacts, state: DecodeState, prediction: Prediction) -> bool:
    """Whether this request and those already running there get what they were promised."""
    tpot_targets = [t for t in (request.tpot_s, state.tpot_s) if t is not None]
    is_first_in_time = request.ttft_s is None or prediction.ttft_s <= request.ttft_s
    return is_first_in_time and all(prediction.tpot_s <= t for t in tpot_targets)


def with_room(request: RequestFacts, cluster: ClusterSnapshot) -> list[DecodeState]:
    """The decode workers that can hold the request now; raises as `Policy` says if none."""
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


def order_prefill(cluster: ClusterSnapshot) -> list[PrefillState]:
    """The prefill worker with the least work ahead of a new prompt, then its spares."""

    def rank(state: PrefillState) -> tuple[float, int, str]:
        num_tokens = state.status.num_queued_tokens + state.num_outstanding_tokens
        return queue_s(state), num_tokens, state.member.worker_id

    return sorted(cluster.prefill, key=rank)[:MAX_PREFILL_WORKERS]
