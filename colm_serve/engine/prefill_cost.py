"""Times passes over a prompt before there are any prompts."""

from __future__ import annotations

from functools import partial

from colm_serve.core import PrefillCost
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.timing import median_s
from colm_serve.kv.pool import KvPool
from colm_serve.model.serving import ServingModel

_MEASURED_TOKENS = 128
_BEHIND_TOKENS = 1024


def measure_prefill_cost(
    model: ServingModel, pool: KvPool, chunk_tokens: int, repeats: int = 3
) -> PrefillCost:
    """Time a pass over one token, one over many, and one over as many behind a long prefix.

    Uses the pool's first pages as scratch: call it before anything is cached.
    """
    most = min(pool.num_pages * pool.page_size, model.config.max_context)
    num_tokens = min(_MEASURED_TOKENS, chunk_tokens, most)
    num_before = min(_BEHIND_TOKENS, most - num_tokens)
    table = pool.table(range(-(-(num_before + num_tokens) // pool.page_size)))
    one_s, many_s, behind_s = (
        median_s(
            partial(run_prefill, model, pool, [PrefillChunk((0,) * length, start, table)]), repeats
        )
        for start, length in ((0, 1), (0, num_tokens), (num_before, num_tokens))
    )
    token_s = max(0.0, many_s - one_s) / max(1, num_tokens - 1)
    return PrefillCost(
        pass_s=max(0.0, one_s - token_s),
        token_s=token_s or one_s,
        attended_key_s=max(0.0, behind_s - many_s) / max(1, num_before * num_tokens),
        chunk_tokens=chunk_tokens,
    )
