"""A long prompt's sparse attention: each head's selector asked, its choice made an index.

Shapes: T rows of a span, Q query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from colm_serve.config import SparseConfig
from colm_serve.engine.sparse.antidiagonal import Antidiagonal
from colm_serve.engine.sparse.head_keys import BlockGrid, build_index
from colm_serve.engine.sparse.pattern_file import load_patterns
from colm_serve.engine.sparse.selectors import Dense, Selector
from colm_serve.kernels.sparse_attention import SparseIndex
from colm_serve.kv.pool import KvPool
from colm_serve.model.config import ColmConfig
from colm_serve.model.head_order import stored_heads
from colm_serve.model.paged import Span


class SelectedSparsity:
    """Chain 1's sparse attention; implements `model.paged.Sparsity`."""

    def __init__(self, selectors: Sequence[Sequence[Selector]], min_tokens: int) -> None:
        """For prompts of at least `min_tokens`; shorter ones attend to all.

        Args:
            selectors: those of each layer's chain-1 heads, in the order of the heads in memory.
        """
        self.selectors = selectors
        self._min_tokens = min_tokens

    def index(self, layer: int, span: Span, q_TQH: Tensor, pool: KvPool) -> SparseIndex | None:
        selectors = self.selectors[layer]
        if span.num_prompt_tokens < self._min_tokens:
            return None
        if all(isinstance(selector, Dense) for selector in selectors):
            return None
        k_SNH = pool.read_keys(layer, span.table, span.stop)
        return select_keys(selectors, q_TQH, k_SNH, BlockGrid(span.start, span.stop))


def make_sparsity(sparse: SparseConfig, model: ColmConfig) -> SelectedSparsity | None:
    """What the configuration asks for; None attends to all keys.

    Raises:
        InvalidConfig: the pattern file cannot be read, or is not of this model's chain 1.
    """
    num_layers, num_heads = model.num_layers, model.heads_per_chain[0]
    selectors: list[list[Selector]]
    if sparse.selector == "none":
        return None
    if sparse.selector == "adaptive":
        selectors = [[Antidiagonal(sparse.gamma)] * num_heads] * num_layers
    else:
        assert sparse.pattern_file is not None, "the configuration was validated"
        layers = load_patterns(sparse.pattern_file, num_layers, num_heads)
        order = stored_heads(model)
        selectors = [[heads[head].selector for head in order] for heads in layers]
    return SelectedSparsity(selectors, sparse.min_tokens)


def select_keys(
    selectors: Sequence[Selector], q_TQH: Tensor, k_SNH: Tensor, grid: BlockGrid
) -> SparseIndex:
    """Ask each head's selector; query head j reads kv head j % N (tile order)."""
    num_kv_heads = k_SNH.shape[1]
    heads = [
        selector.select(q_TQH[:, head], k_SNH[:, head % num_kv_heads], grid)
        for head, selector in enumerate(selectors)
    ]
    return build_index(grid, heads)
