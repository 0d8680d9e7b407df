"""Times passes over a prompt before there are any prompts."""

from __future__ import annotations

from functools import partial

from colm_serve.core import PrefillCost
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.timing import least_s
from colm_serve.kv.pool import KvPool
from colm_serve.latency.cost_fit import fit_costs
from colm_serve.model.serving import ServingModel

_MOST_TOKENS = 128
_BEHIND_TOKENS = 1024


def measure_prefill_cost(
    model: ServingModel, pool: KvPool, chunk_tokens: int, budget_s: float = 2.0
) -> PrefillCost:
    """Time passes over one token, some, many, and as many behind a long prefix.

    Uses the pool's first pages as scratch: call it before anything is cached.
    """
    most = min(pool.num_pages * pool.page_size, model.config.max_context)
    num_tokens = min(_MOST_TOKENS, chunk_tokens, most)
    num_before = min(_BEHIND_TOKENS, most - num_tokens)
    table = pool.table(range(-(-(num_before + num_tokens) // pool.page_size)))
    spans = [
        (0, 1),
        (0, -(-num_tokens // 4)),
        (0, num_tokens),
        (num_before, num_before + num_tokens),
    ]
    runs = [
        partial(run_prefill, model, pool, [PrefillChunk((0,) * (stop - start), start, table)])
        for start, stop in spans
    ]
    loads = [
        (1.0, float(stop - start), float(PrefillCost.num_attended_keys(start, stop)))
        for start, stop in spans
    ]
    pass_s, token_s, attended_key_s = fit_costs(loads, least_s(runs, budget_s))
    return PrefillCost(pass_s, token_s or pass_s, attended_key_s, chunk_tokens)
