"""Which workers serve a request, and at which level. Pure: values in, a placement out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from colm_serve.config import RouterConfig
from colm_serve.router.placing.facts import Placement, RequestFacts
from colm_serve.router.placing.latency_model import prefilled_s
from colm_serve.router.placing.offer import Offer, Offers
from colm_serve.router.placing.room import with_room
from colm_serve.router.placing.snapshot import ClusterSnapshot, PrefillState

__all__ = [
    "Placement", "Policy", "RequestFacts", "adaptive", "aggregated", "fixed_level", "make_policy",
]  # fmt: skip

#: The prefill worker to ask, and its spares.
MAX_PREFILL_WORKERS = 3


class Policy(Protocol):
    """The seam: anything that decides placements."""

    def __call__(self, request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
        """Place a request.

        Raises:
            Unavailable: no decode worker is reachable.
            ResourceExhausted: none has room now, or even the lowest level would break targets.
            InvalidArgument: none could hold the request, or keep the targets that it names, even
                if it were idle.
        """


def make_policy(config: RouterConfig) -> Policy:
    """The policy that the config names."""
    match config.policy:
        case "fixed_level":
            assert config.fixed_level is not None, "the config was checked"
            return fixed_level(config.fixed_level)
        case "aggregated":
            return aggregated
        case "adaptive":
            return adaptive


def adaptive(request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
    """Where every target holds and the least delay is predicted; there, the highest level.

    Targets may hold only once those that run have been moved down (see `level_moves`). A request
    that has begun is served even if they do not.
    """
    prefill = order_prefill(cluster.prefill, len(request.prompt))
    made = Offers(request, prefill)
    offers = [made.highest(state) for state in with_room(request, cluster)]
    best = least(offers, request)
    if not best.is_kept and not request.is_begun:
        made.refuse(offers)
    return made.place(best)


def fixed_level(level: int) -> Policy:
    """Every request at one level, or the nearest of its bounds: there, the least finish."""

    def place(request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
        prefill = order_prefill(cluster.prefill, len(request.prompt))
        made = Offers(request, prefill)
        nearest = min(max(level, request.min_level), request.max_level)
        offers = [made.at(state, nearest) for state in with_room(request, cluster)]
        return made.place(least(offers, request))

    return place


def aggregated(request: RequestFacts, cluster: ClusterSnapshot) -> Placement:
    """As `adaptive`, but decode workers compute the prompts themselves."""
    return adaptive(request, replace(cluster, prefill=()))


def least(offers: Iterable[Offer], request: RequestFacts) -> Offer:
    return min(offers, key=lambda offer: offer.rank())


def order_prefill(prefill: Iterable[PrefillState], num_prompt_tokens: int) -> list[PrefillState]:
    """The prefill worker that will have the prompt first, by queue and cache, then its spares."""

    def rank(state: PrefillState) -> tuple[float, int, str]:
        num_tokens = state.status.num_queued_tokens + state.num_outstanding_tokens
        return prefilled_s(state, num_prompt_tokens), num_tokens, state.member.worker_id

    return sorted(prefill, key=rank)[:MAX_PREFILL_WORKERS]
