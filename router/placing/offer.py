"""What a decode worker has for a request: a level, and what it gets there. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from colm_serve.errors import InvalidArgument, TargetsMissed
from colm_serve.router.placing.facts import Placement, RequestFacts
from colm_serve.router.placing.latency_model import (
    AIMED_TPOT_SHARE,
    AIMED_TTFT_SHARE,
    Prediction,
    idle_prediction,
    light_limit_s,
    prefilled_s,
    prompt_s,
    upper_limit_s,
)
from colm_serve.router.placing.load import TokenTimes
from colm_serve.router.placing.pace import pace_of
from colm_serve.router.placing.room import RETRY_AFTER_S
from colm_serve.router.placing.snapshot import DecodeState, PrefillState


class Offer(NamedTuple):
    """A level at a decode worker, and whether this request's targets and the others' are kept.

    For that each may be moved down as far as it may. `delay_s` is what the request takes when all
    are, and what it makes the others wait.
    """

    state: DecodeState
    level: int
    prediction: Prediction
    delay_s: float
    is_kept: bool = True

    def rank(self) -> tuple[bool, float, int, str]:
        """The least is the best: kept targets, then the delay."""
        load, worker_id = len(self.state.outstanding), self.state.member.worker_id
        return (not self.is_kept, self.delay_s, load, worker_id)


class Offers:
    """What decode workers have for one request, whose prompt comes from `prefill`, in order."""

    def __init__(self, request: RequestFacts, prefill: Sequence[PrefillState]) -> None:
        self._request = request
        self._prefill = prefill
        self._num_attended = request.num_attended
        self._pace = pace_of(request.tpot_s)
        num_prompt = len(request.prompt)
        self._prefilled_s = prefilled_s(prefill[0], num_prompt) if prefill else None

    def at(self, state: DecodeState, level: int) -> Offer:
        """This level, whatever becomes of the targets."""
        prediction = self._prediction(self._prompt_s(state), state.times, level)
        return Offer(state, level, prediction, prediction.finish_s(self._request.max_tokens))

    def highest(self, state: DecodeState) -> Offer:
        """The highest level at which the worker keeps all targets, else the request's lowest.

        Levels come and go, but the request stays where it is put: so it is by their lowest levels
        that a worker keeps targets or not, and is better than others.
        """
        request, first_s = self._request, self._prompt_s(state)
        limit_s = self._token_limit_s(state)
        lowest = self._prediction(first_s, state.lowered_times, request.min_level)
        delay_s, is_kept = self._delay_s(state, lowest), self._keeps(lowest, limit_s)
        for level in range(request.max_level, request.min_level - 1, -1):
            prediction = self._prediction(first_s, state.times, level)
            is_lowest = level == request.min_level
            most_s = limit_s if is_lowest else upper_limit_s(limit_s, level, state.status.step_cost)
            if self._keeps(prediction, most_s) and self._is_done_in_time(prediction):
                return Offer(state, level, prediction, delay_s, is_kept)
        return Offer(state, request.min_level, lowest, delay_s, is_kept)

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
        ttft_s = min(prediction.ttft_s for prediction in idle)
        tpot_s = min(prediction.tpot_s for prediction in idle)
        for field, target_s, share, least_s in (
            ("ttft_ms", request.ttft_s, AIMED_TTFT_SHARE, ttft_s),
            ("tpot_ms", request.tpot_s, AIMED_TPOT_SHARE, tpot_s),
        ):
            if target_s is not None and share * target_s < least_s:
                if field not in request.own_targets or target_s >= least_s:
                    return
                allowed = f"{least_s * 1000:.4g} or more, predicted of an idle worker at level"
                raise InvalidArgument(field, target_s * 1000, f"{allowed} {level}")
        best = min(offers, key=lambda offer: offer.rank()).prediction
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

    def _delay_s(self, state: DecodeState, lowest: Prediction) -> float:
        """Where others want another pace, the request costs more than what it adds."""
        request = self._request
        added_s = state.lowered_times.added_s(request.min_level, self._num_attended)
        others_s = (request.max_tokens - 1) * added_s * state.load.num_rows[0]
        misfit = 0 if state.pace is None else abs(state.pace - self._pace)
        return (1 + misfit) * (lowest.finish_s(request.max_tokens) + others_s)

    def _token_limit_s(self, state: DecodeState) -> float:
        """What a token may take at first, for this request and those already running there.

        It takes less later, as others end.
        """
        request, outlook = self._request, state.outlook
        own_s = math.inf if request.tpot_s is None else AIMED_TPOT_SHARE * request.tpot_s
        others_s = math.inf if state.tpot_s is None else AIMED_TPOT_SHARE * state.tpot_s
        if outlook is not None:
            own_s += outlook.departures.mean_saving_s(request.max_tokens)
            if state.tpot_s == outlook.tpot_s:
                others_s = outlook.limit_s
        if self._yields(state):
            others_s = light_limit_s(others_s, request.min_level, state.status.step_cost)
        return min(own_s, others_s)

    def _yields(self, state: DecodeState) -> bool:
        """Whether heavier requests may come to the worker, for which some of it is to be left."""
        heavier_tpot_s = self._request.heavier_tpot_s
        if heavier_tpot_s is None:
            return False
        return state.pace is None or state.pace <= pace_of(heavier_tpot_s)

    def _keeps(self, prediction: Prediction, limit_s: float) -> bool:
        """Whether the first token comes in time, and the others as fast as they have to."""
        request = self._request
        ttft_s = math.inf if request.ttft_s is None else AIMED_TTFT_SHARE * request.ttft_s
        return request.age_s + prediction.ttft_s <= ttft_s and prediction.tpot_s <= limit_s

    def _is_done_in_time(self, prediction: Prediction) -> bool:
        """Whether all tokens that it may have come by its deadline; its text may end before."""
        request = self._request
        finish_s = request.age_s + prediction.finish_s(request.max_tokens)
        return request.deadline_s is None or finish_s <= request.deadline_s
