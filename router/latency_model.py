"""Predicts what a request would get on a worker, from the worker's own measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from colm_serve.core import DecodeStatus
from colm_serve.router.snapshot import DecodeState, PrefillState, Work


@dataclass(frozen=True)
class Prediction:
    """Seconds to the first token, and of each later one."""

    ttft_s: float
    tpot_s: float

    def finish_s(self, max_tokens: int) -> float:
        return self.ttft_s + (max_tokens - 1) * self.tpot_s


@dataclass(frozen=True)
class Load:
    """What a worker's rows are: how many use each chain, and how many tokens these attend to."""

    num_rows: tuple[int, ...]
    num_attended: tuple[int, ...]

    @classmethod
    def of(cls, state: DecodeState) -> Load:
        """What runs there, and what has been sent there since."""
        num_levels = state.status.num_levels
        rows = _per_chain(state.status.num_running, num_levels)
        attended = _per_chain(state.status.num_attended, num_levels)
        for work in state.outstanding:
            for chain in range(work.level):
                rows[chain] += 1
                attended[chain] += work.num_prompt_tokens
        return cls(tuple(rows), tuple(attended))

    def lowered(self, placed: Iterable[Work]) -> Load:
        """The same, once each of these runs at the lowest level that it may."""
        rows, attended = list(self.num_rows), list(self.num_attended)
        for work in placed:
            for chain in range(work.min_level, work.level):
                if rows[chain]:
                    attended[chain] -= attended[chain] // rows[chain]
                    rows[chain] -= 1
        return Load(tuple(rows), tuple(attended))

    def tpot_s_with(self, status: DecodeStatus, num_attended: int) -> list[float]:
        """Seconds from token to token at each level, once a further request runs there at it.

        What waits at the worker is taken to run at that level too, and to be as long: nothing
        better is known of it. More rows than a step holds take turns.

        Args:
            num_attended: tokens that the request attends to.
        """
        cost, max_rows = status.step_cost, status.max_rows
        num_new = 1 + status.num_waiting
        turns = max(1.0, (self.num_rows[0] + num_new) / max_rows)
        base_s = more_s = 0.0
        more_by_level = []
        for chain, (rows, attended) in enumerate(
            zip(self.num_rows, self.num_attended, strict=True)
        ):
            without_s = cost.chain_step_s(chain, min(rows, max_rows), attended / turns)
            more = (attended + num_new * num_attended) / turns
            base_s += without_s
            more_s += cost.chain_step_s(chain, min(rows + num_new, max_rows), more) - without_s
            more_by_level.append(more_s)
        return [turns * (base_s + seconds) for seconds in more_by_level]


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
    waiting_s = queue_s(state)
    if not state.status.num_waiting and not state.num_outstanding_tokens:
        waiting_s = min(waiting_s, state.status.num_running * own_s)
    return waiting_s + own_s


def queue_s(state: PrefillState) -> float:
    """Seconds of work at a prefill worker; what is not in its status is taken for short prompts."""
    cost = state.status.cost
    each_s = cost.token_s + cost.pass_s / max(1, cost.chunk_tokens)
    return state.status.queued_s + each_s * state.num_outstanding_tokens


def idle_prediction(
    state: DecodeState,
    prefill: PrefillState | None,
    level: int,
    num_tokens: int,
    num_attended: int,
) -> Prediction:
    """What a request would get at a level were there no others."""
    num_levels = state.status.num_levels
    nothing = Load((0,) * num_levels, (0,) * num_levels)
    status = replace(state.status, num_waiting=0)
    tpot_s = nothing.tpot_s_with(status, num_attended)[level - 1]
    own_s = None
    if prefill is not None:
        own_s = prefill.status.cost.seconds(prefill.num_matched_tokens, num_tokens)
    return Prediction(prompt_s(state, own_s, num_tokens) + tpot_s, tpot_s)


def _per_chain(per_level: Sequence[int], num_levels: int) -> list[int]:
    """Of those at its level and above, which use the chain; a worker may not tell the levels."""
    counts = [*per_level, *[0] * (num_levels - len(per_level))]
    for chain in range(num_levels - 2, -1, -1):
        counts[chain] += counts[chain + 1]
    return counts
