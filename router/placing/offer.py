"""What a decode worker has for a request: a level, and what it gets there. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from colm_serve.errors import InvalidArgument, TargetsMissed
from colm_serve.router.placing.facts import Placement, RequestFacts
from colm_serve.router.placing.latency_model import (
    AIMED_SHARE,
    Prediction,
    idle_prediction,
    light_limit_s,
    prefilled_s,
    prompt_s,
    upper_limit_s,
)
from colm_serve.router.placing.load import TokenTimes
from colm_serve.router.placing.room import RETRY_AFTER_S
from colm_serve.router.placing.snapshot import DecodeState, PrefillState


class Offer(NamedTuple):
    """A level at a decode worker; whether this request's targets and the others' are kept there.

    If it `lowers_others`, that takes moving those that run there to the lowest level they may.
    """

    state: DecodeState
    level: int
    prediction: Prediction
    is_kept: bool = True
    lowers_others: bool = False

    def rank(self, max_tokens: int) -> tuple[bool, int, bool, float, int, str]:
        """The least is the best: kept targets, then the level, then the finish."""
        finish_s = self.prediction.finish_s(max_tokens)
        load, worker_id = len(self.state.outstanding), self.state.member.worker_id
        return (not self.is_kept, -self.level, self.lowers_others, finish_s, load, worker_id)


class Offers:
    """What decode workers have for one request, whose prompt comes from `prefill`, in order."""

    def __init__(self, request: RequestFacts, prefill: Sequence[PrefillState]) -> None:
        self._request = request
        self._prefill = prefill
        self._num_attended = request.num_attended
        num_prompt = len(request.prompt)
        self._prefilled_s = prefilled_s(prefill[0], num_prompt) if prefill else None

    def at(self, state: DecodeState, level: int) -> Offer:
        """This level, whatever becomes of the targets."""
        return Offer(state, level, self._prediction(self._prompt_s(state), state.times, level))

    def highest(self, state: DecodeState) -> Offer:
        """The highest level at which the worker keeps all targets, else the request's lowest."""
        request, first_s = self._request, self._prompt_s(state)
        limit_s = self._token_limit_s(state)
        for level in range(request.max_level, request.min_level - 1, -1):
            prediction = self._prediction(first_s, state.times, level)
            is_lowest = level == request.min_level
            most_s = limit_s if is_lowest else upper_limit_s(limit_s, level, state.status.step_cost)
            if self._keeps(prediction, most_s) and self._is_done_in_time(prediction):
                return Offer(state, level, prediction)
        prediction = self._prediction(first_s, state.lowered_times, request.min_level)
        is_kept = self._keeps(prediction, limit_s)
        return Offer(state, request.min_level, prediction, is_kept, lowers_others=True)

    def place(self, offer: Offer) -> Placement:
        workers = tuple(state.member for state in self._prefill)
        return Placement(offer.state.member, workers, offer.level, offer.prediction)

    def refuse(self, offers: Sequence[Offer]) -> None:
        """No offer keeps the targets; those of its class may be out of reach of idle workers too.

        Such a class's requests are served, as waiting would not help them.

        Raises:
            InvalidArgument: a target that the request names is out of reach.
            TargetsMissed: all could be kept were there less to do.
        """
        request, level = self._request, self._request.min_level
        first = self._prefill[0] if self._prefill else None
        idle = [
            idle_prediction(o.state, first, level, len(request.prompt), request.num_attended)
            for o in offers
        ]
        for field, target_s, least_s in (
            ("ttft_ms", request.ttft_s, min(prediction.ttft_s for prediction in idle)),
            ("tpot_ms", request.tpot_s, min(prediction.tpot_s for prediction in idle)),
        ):
            if target_s is not None and AIMED_SHARE * target_s < least_s:
                if field not in request.own_targets or target_s >= least_s:
                    return
                allowed = f"{least_s * 1000:.4g} or more, predicted of an idle worker at level"
                raise InvalidArgument(field, target_s * 1000, f"{allowed} {level}")
        best = min(offers, key=lambda offer: offer.rank(request.max_tokens)).prediction
        raise TargetsMissed(
            f"targets would be missed even at level {level}, the lowest allowed: predicted are "
            f"{best.ttft_s * 1000:.4g} ms to the first token, {best.tpot_s * 1000:.4g} ms for "
            "each later one; try again later",
            RETRY_AFTER_S,
        )

    def _prompt_s(self, state: DecodeState) -> float:
        return prompt_s(state, self._prefilled_s, len(self._request.prompt))

    def _prediction(self, first_s: float, times: TokenTimes, level: int) -> Prediction:
        tpot_s = times.tpot_s(level, self._num_attended)
        return Prediction(first_s + tpot_s, tpot_s)

    def _token_limit_s(self, state: DecodeState) -> float:
        """What a token may take, for this request and those already running there."""
        request, cost = self._request, state.status.step_cost
        own_s = math.inf if request.tpot_s is None else AIMED_SHARE * request.tpot_s
        others_s = math.inf if state.tpot_s is None else AIMED_SHARE * state.tpot_s
        if request.is_light:
            others_s = light_limit_s(others_s, request.min_level, cost)
        return min(own_s, others_s)

    def _keeps(self, prediction: Prediction, limit_s: float) -> bool:
        """Whether the first token comes in time, and the others as fast as they have to."""
        request = self._request
        ttft_s = math.inf if request.ttft_s is None else AIMED_SHARE * request.ttft_s
        return request.age_s + prediction.ttft_s <= ttft_s and prediction.tpot_s <= limit_s

    def _is_done_in_time(self, prediction: Prediction) -> bool:
        """Whether all tokens that it may have come by its deadline; its text may end before."""
        request = self._request
        finish_s = request.age_s + prediction.finish_s(request.max_tokens)
        return request.deadline_s is None or finish_s <= request.deadline_s
