"""Predicts what a request would get on a worker, from the worker's own measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colm_serve.router.snapshot import DecodeState, PrefillState


@dataclass(frozen=True)
class Prediction:
    """Seconds to the first token, and of each later one."""

    ttft_s: float
    tpot_s: float

    def finish_s(self, max_tokens: int) -> float:
        return self.ttft_s + (max_tokens - 1) * self.tpot_s


def predict(
    state: DecodeState,
    prefill: PrefillState | None,
    *,
    level: int,
    num_prompt_tokens: int,
    max_tokens: int,
) -> Prediction:
    """What a request gets at `level` on a decode worker whose prompt KV comes from `prefill`.

    Work that waits at the worker is taken to run at the request's own level, and to be as long
    as the request: nothing better is known of it.
    """
    rows = rows_by_level(state, level)
    num_rows = sum(rows)
    max_rows = state.status.max_rows
    # More rows than a step holds take turns.
    turns = max(1.0, num_rows / max_rows)
    tpot_s = turns * state.status.step_cost.step_s(_rows_per_chain(rows, max_rows))
    prompt_s = prefill_s(state, prefill, num_prompt_tokens)
    return Prediction(ttft_s=prompt_s + tpot_s, tpot_s=tpot_s)


def rows_by_level(state: DecodeState, level: int) -> tuple[int, ...]:
    """Rows at each level, level 1 first, once the request runs there at `level`."""
    rows = list(state.status.num_running)
    rows += [0] * (state.status.num_levels - len(rows))
    rows[level - 1] += 1 + state.status.num_waiting
    for work in state.outstanding:
        rows[work.level - 1] += 1
    return tuple(rows)


def prefill_s(state: DecodeState, prefill: PrefillState | None, num_tokens: int) -> float:
    """Seconds until a prompt's KV is at the decode worker; a rate not yet measured costs 0."""
    if prefill is None:
        return _seconds(num_tokens, state.status.prefill_tokens_per_s)
    return queue_s(prefill) + _seconds(num_tokens, prefill.status.tokens_per_s)


def queue_s(prefill: PrefillState) -> float:
    """Seconds of work ahead of a new prompt at a prefill worker."""
    num_tokens = prefill.status.num_queued_tokens + prefill.num_outstanding_tokens
    return _seconds(num_tokens, prefill.status.tokens_per_s)


def _seconds(num_tokens: int, tokens_per_s: float) -> float:
    return num_tokens / tokens_per_s if tokens_per_s > 0 else 0.0


def _rows_per_chain(rows: Sequence[int], max_rows: int) -> tuple[int, ...]:
    """Rows that use each chain: those at its level and above, at most a full step."""
    return tuple(min(max_rows, sum(rows[chain:])) for chain in range(len(rows)))
