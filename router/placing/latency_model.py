"""Predicts what a request would get on a worker, from the worker's own measurements."""

from __future__ import annotations

from typing import NamedTuple

from colm_serve.core import StepCost
from colm_serve.router.placing.load import Load, TokenTimes
from colm_serve.router.placing.snapshot import DecodeState, PrefillState

#: Of a target: what is predicted may take so much of it, as predictions are not exact,
AIMED_TTFT_SHARE = 0.9
#: and less so of one time than of the mean of many.
AIMED_TPOT_SHARE = 0.95
#: Of what a row alone leaves of a limit: so much is filled before levels go down,
UPPER_SHARE = 0.3
#: and so much by requests of light classes; the rest is for heavier ones to come.
LIGHT_SHARE = 0.33


class Prediction(NamedTuple):
    """Seconds to the first token, and of each later one."""

    ttft_s: float
    tpot_s: float

    def finish_s(self, max_tokens: int) -> float:
        return self.ttft_s + (max_tokens - 1) * self.tpot_s


def upper_limit_s(limit_s: float, level: int, cost: StepCost, share: float = 1.0) -> float:
    """How long a step may take for a row to run at `level`, above the lowest that it may.

    The rest of `limit_s` is kept for a burst: those that run fast and low end soon, so that there
    are few of them when it comes. A row that is alone may take all.

    Args:
        share: of what may be filled.
    """
    return _filled_s(limit_s, share * UPPER_SHARE, level, cost)


def light_limit_s(limit_s: float, level: int, cost: StepCost) -> float:
    """How long a step may take for a row of a light class, at the lowest level that it may."""
    return _filled_s(limit_s, LIGHT_SHARE, level, cost)


def _filled_s(limit_s: float, share: float, level: int, cost: StepCost) -> float:
    """What a row takes alone, and that share of what it leaves."""
    alone_s = sum(cost.chain_s[:level])
    return limit_s if limit_s <= alone_s else alone_s + share * (limit_s - alone_s)


def prompt_s(state: DecodeState, computed_s: float | None, num_tokens: int) -> float:
    """Seconds until a prompt's keys and values are at the decode worker.

    It computes them itself where that is sooner; a rate not yet measured is not counted on, and
    costs nothing where there is no other way.

    Args:
        computed_s: when the prefill worker has them, see `prefilled_s`; None: there is no such.
    """
    num_missing = num_tokens - state.num_matched_tokens
    if num_missing <= 0:
        return 0.0
    rate = state.status.prefill_tokens_per_s
    local_s = num_missing / rate if rate > 0 else None
    if computed_s is None:
        return local_s or 0.0
    transfer = state.status.transfer_cost
    shipped_s = transfer.call_s + max(computed_s, num_missing * transfer.token_s)
    return shipped_s if local_s is None else min(shipped_s, local_s)


def prefilled_s(state: PrefillState, num_tokens: int) -> float:
    """Seconds until a prefill worker has computed a new prompt, behind what is queued there.

    Prompts share its passes equally: each other one holds this one up for as long as it takes
    itself at most, once all have their pages.
    """
    own_s = state.status.cost.seconds(state.num_matched_tokens, num_tokens)
    waiting_s = state.queue_s
    if not state.status.num_waiting and not state.num_outstanding_tokens:
        waiting_s = min(waiting_s, state.status.num_running * own_s)
    return waiting_s + own_s


def idle_prediction(
    state: DecodeState,
    prefill: PrefillState | None,
    level: int,
    num_tokens: int,
    num_attended: int,
) -> Prediction:
    """What a request would get at a level were there no others."""
    nothing = Load.of_work((), state.status.num_levels)
    times = TokenTimes(nothing, state.status.step_cost, state.status.max_rows)
    tpot_s = times.tpot_s(level, num_attended)
    own_s = None
    if prefill is not None:
        own_s = prefill.status.cost.seconds(prefill.num_matched_tokens, num_tokens)
    return Prediction(prompt_s(state, own_s, num_tokens) + tpot_s, tpot_s)
