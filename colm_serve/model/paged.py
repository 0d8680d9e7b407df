"""Attention whose keys and values live in the pages of a KV pool: serving.

Works for CoLM-Air (and LLaMA, which is CoLM with one chain): K and V are the same at every level,
so rows of any level write and read the same pages.

Shapes: T rows, S cached tokens, N kv heads, Q query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from colm_serve.kernels import dispatch
from colm_serve.kernels.paged_attention import attend
from colm_serve.kernels.sparse_attention import SparseIndex
from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.config import ColmConfig

#: Consecutive tokens from which on blocked attention is faster than row by row on a CPU.
_LONG_SPAN = 16


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence, as consecutive rows of a batch."""

    table: BlockTable
    first_row: int
    num_rows: int
    start: int  # position of the first of them
    level: int
    num_prompt_tokens: int = 0  # of the whole prompt that they are a chunk of, if of one

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


class Sparsity(Protocol):
    """Chooses which keys a long prompt's rows attend to."""

    def index(self, layer: int, span: Span, q_TQH: Tensor, pool: KvPool) -> SparseIndex | None:
        """Of a span whose keys stand in the pool; None attends to all."""


class RowIndex:
    """A batch row by row, in the arrays that kernels for a CPU take; all int64.

    Attributes:
        positions: each row's place in its sequence.
        slots: each row's place in the pool.
        num_heads: query heads of each row's level.
        page_starts: where the pages of each row's sequence begin in `pages`.
        pages: of all sequences, one after the other.
        single: the rows to attend with one by one.
        spans: those of the spans that are attended with as a whole.
        long: a row for each of `spans`: its first row, number of rows and position, query heads
            of its level, and where its pages begin in `pages`.
    """

    def __init__(self, spans: Sequence[Span], heads_by_level: Sequence[int]) -> None:
        lengths = [span.num_rows for span in spans]
        tables = [span.table.page_array for span in spans]
        starts = np.array([span.start for span in spans], dtype=np.int64)
        first_rows = np.array([span.first_row for span in spans], dtype=np.int64)
        heads = np.array([heads_by_level[span.level - 1] for span in spans], dtype=np.int64)
        firsts = np.array([0, *accumulate(map(len, tables))][:-1], dtype=np.int64)
        rows = np.arange(sum(lengths), dtype=np.int64)
        self.pages = np.concatenate(tables)
        self.positions = rows + np.repeat(starts - first_rows, lengths)
        self.num_heads = np.repeat(heads, lengths)
        self.page_starts = np.repeat(firsts, lengths)
        page_size = spans[0].table.page_size
        pages = self.pages[self.page_starts + self.positions // page_size]
        self.slots = pages * page_size + self.positions % page_size
        is_long = np.array(lengths) >= _LONG_SPAN
        self.single = rows[~np.repeat(is_long, lengths)]
        self.spans = [span for span in spans if span.num_rows >= _LONG_SPAN]
        self.long = np.column_stack([first_rows, lengths, starts, heads, firsts])[is_long]


class PagedContext:
    """An `AttentionContext` over the pages of several sequences."""

    def __init__(
        self,
        config: ColmConfig,
        pool: KvPool,
        spans: Sequence[Span],
        on_layer: Callable[[int], None] | None = None,
        sparsity: Sparsity | None = None,
    ) -> None:
        """An attention over the pages of `spans`.

        Args:
            on_layer: called after a layer's keys and values stand in the pool.
            sparsity: which keys the spans attend to; default: all.
        """
        assert config.kv_sharing == "air" or config.num_chains == 1, "paged serving needs Air"
        self.pool = pool
        self._num_heads = tuple(accumulate(config.heads_per_chain))
        self._spans = spans
        self.on_layer = on_layer
        self.sparsity = sparsity

    @cached_property
    def rows(self) -> RowIndex:
        """The same batch, for kernels that work row by row."""
        return RowIndex(self._spans, self._num_heads)

    def store(self, layer: int, k_TNH: Tensor, v_TNH: Tensor) -> None:
        for span in self._spans:
            self.pool.write(layer, span.table, span.start, k_TNH[span.rows], v_TNH[span.rows])
        self.stored(layer)

    def stored(self, layer: int) -> None:
        """A layer's keys and values of this batch stand in the pool."""
        if self.on_layer is not None:
            self.on_layer(layer)

    def attend(self, layer: int, q_TQH: Tensor, num_rows: Sequence[int]) -> Tensor:
        o_TQH = torch.zeros_like(q_TQH)
        for span in self._spans:
            heads = self._num_heads[span.level - 1]
            o_TQH[span.rows, :heads] = self.attend_span(layer, span, q_TQH[span.rows, :heads])
        return o_TQH

    def attend_span(self, layer: int, span: Span, q_TQH: Tensor) -> Tensor:
        """Attend with the rows of one span, sparsely where the context says so."""
        k_SNH, v_SNH = self.pool.read(layer, span.table, 0, span.stop)
        index = self.index(layer, span, q_TQH)
        if index is None:
            return attend(q_TQH, k_SNH, v_SNH)
        return dispatch.attend_sparse(q_TQH, k_SNH, v_SNH, index)

    def index(self, layer: int, span: Span, q_TQH: Tensor) -> SparseIndex | None:
        """Which keys a span's rows attend to; None: all."""
        if self.sparsity is None:
            return None
        return self.sparsity.index(layer, span, q_TQH, self.pool)
