"""Offline: which pattern keeps most of each head's attention at an equal budget of keys.

As MInference's kernel-aware search: candidates read the same share of the keys, so they cost the
same, and the one that keeps most mass wins. Judged on the last chunk of a long text, whose rows
see most.

Shapes: T rows of a span, S tokens with keys, Q query heads, N kv heads, H head dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from colm_serve.engine.loading import kv_layout
from colm_serve.engine.sparse.head_keys import BlockGrid
from colm_serve.engine.sparse.mass import keys_read, mass_kept
from colm_serve.engine.sparse.pattern_file import HeadPattern
from colm_serve.engine.sparse.selectors import (
    NUM_FIRST_COLUMNS,
    AShape,
    BlockSparse,
    Dense,
    Selector,
    VerticalSlash,
)
from colm_serve.engine.sparse.sparsity import select_keys
from colm_serve.kernels.sparse_attention import SparseIndex
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.head_order import stored_heads
from colm_serve.model.paged import PagedContext, Span
from colm_serve.model.serving import ServingModel

CHUNK_TOKENS = 2048
_PAGE_SIZE = 64

#: A pattern of one free size: the larger, the more keys it reads.
_FAMILIES: tuple[Callable[[int], Selector], ...] = (
    partial(AShape, 64),
    partial(AShape, 256),
    partial(VerticalSlash, NUM_FIRST_COLUMNS),
    partial(VerticalSlash, 100),
    partial(VerticalSlash, 500),
    partial(VerticalSlash, 2000),
    BlockSparse,
)


@torch.inference_mode()
def search_patterns(
    loaded: LoadedModel[ServingModel], tokens: Sequence[int], budget: float
) -> list[list[HeadPattern]]:
    """The best pattern of each layer's chain-1 heads, in the model's own order.

    Args:
        loaded: chain 1 with its head.
        tokens: of one text, at least 64 and at most the model's context.
        budget: share of the keys that a head may read, above 0 and at most 1.
    """
    model, num_tokens = loaded.model, len(tokens)
    num_pages = -(-num_tokens // _PAGE_SIZE)
    pool = KvPool(kv_layout(loaded), num_pages, _PAGE_SIZE, model.device)
    table = pool.table(range(num_pages))
    trial = _Trial(num_tokens, budget)
    # From the end, so that the last chunk is a whole one.
    starts = [0, *range(num_tokens % CHUNK_TOKENS, num_tokens, CHUNK_TOKENS), num_tokens]
    for start, stop in pairwise(sorted(set(starts))):
        chunk = torch.tensor(tokens[start:stop], device=model.device)
        span = Span(table, 0, len(chunk), start, level=1)
        positions = torch.arange(span.start, span.stop, device=model.device)
        context = PagedContext(model.config, pool, [span], sparsity=trial)
        model(chunk, positions, (len(chunk),), context)
    # In memory heads stand in tile order.
    places = [stored_heads(model.config).index(head) for head in range(len(trial.layers[0]))]
    return [[heads[place] for place in places] for heads in trial.layers]


def best_pattern(q_TH: Tensor, k_SH: Tensor, budget: float) -> HeadPattern:
    """The pattern within the budget that keeps most mass of one head."""
    q_TQH, k_SNH = q_TH[:, None], k_SH[:, None]
    grid = BlockGrid(len(k_SH) - len(q_TH), len(k_SH))

    def index(selector: Selector) -> SparseIndex:
        return select_keys([selector], q_TQH, k_SNH, grid)

    def cost(family: Callable[[int], Selector], size: int) -> float:
        return float(keys_read(index(family(size)), grid)[0])

    candidates: list[Selector] = [Dense()] if budget >= 1 else []
    sizes = range(1, grid.stop + 1)
    for family in _FAMILIES:
        num_affordable = bisect_right(sizes, budget, key=partial(cost, family))
        if num_affordable:
            candidates.append(family(sizes[num_affordable - 1]))
    if not candidates:
        # The rows' own blocks alone are more than the budget.
        candidates.append(AShape(0, 0))
    kept_IQ = mass_kept(q_TQH, k_SNH, [index(selector) for selector in candidates])
    scores = [round(kept, 4) for kept in kept_IQ[:, 0].tolist()]
    # Of equals the first: it is the cheaper to choose keys by.
    best = scores.index(max(scores))
    return HeadPattern(candidates[best], scores[best])


class _Trial:
    """A `Sparsity` that attends to all keys, and tries patterns on the last chunk's rows."""

    def __init__(self, num_tokens: int, budget: float) -> None:
        self._num_tokens = num_tokens
        self._budget = budget
        self.layers: list[list[HeadPattern]] = []

    def index(self, layer: int, span: Span, q_TQH: Tensor, pool: KvPool) -> SparseIndex | None:
        if span.stop == self._num_tokens:
            k_SNH = pool.read_keys(layer, span.table, span.stop)
            num_kv_heads = k_SNH.shape[1]
            self.layers.append(
                [
                    best_pattern(q_TQH[:, head], k_SNH[:, head % num_kv_heads], self._budget)
                    for head in range(q_TQH.shape[1])
                ]
            )
        return None
