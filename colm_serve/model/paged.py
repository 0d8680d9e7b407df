"""Attention whose keys and values live in the pages of a KV pool: serving.

Works for CoLM-Air (and LLaMA, which is CoLM with one chain): K and V are the same at every level,
so rows of any level write and read the same pages.

Shapes: T rows, S cached tokens, N kv heads, R query heads a kv head, Q query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.config import ColmConfig


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence, as consecutive rows of a batch."""

    table: BlockTable
    first_row: int
    num_rows: int
    start: int  # position of the first of them
    level: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


class PagedContext:
    """An `AttentionContext` over the pages of several sequences."""

    def __init__(
        self,
        config: ColmConfig,
        pool: KvPool,
        spans: Sequence[Span],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """`on_layer` is called after a layer's keys and values stand in the pool."""
        assert config.kv_sharing == "air" or config.num_chains == 1, "paged serving needs Air"
        self._num_heads = tuple(accumulate(config.heads_per_chain))
        self._pool = pool
        self._spans = spans
        self._on_layer = on_layer
        self._masks: dict[int, Tensor] = {}

    def store(self, layer: int, k_TNH: Tensor, v_TNH: Tensor) -> None:
        for span in self._spans:
            self._pool.write(layer, span.table, span.start, k_TNH[span.rows], v_TNH[span.rows])
        if self._on_layer is not None:
            self._on_layer(layer)

    def attend(self, layer: int, q_TQH: Tensor, num_rows: Sequence[int]) -> Tensor:
        o_TQH = torch.zeros_like(q_TQH)
        for span in self._spans:
            k_SNH, v_SNH = self._pool.read(layer, span.table, 0, span.stop)
            heads = self._num_heads[span.level - 1]
            q = q_TQH[span.rows, :heads]
            if span.num_rows == 1:
                o_TQH[span.rows, :heads] = _attend_one(q, k_SNH, v_SNH)
            else:
                o_TQH[span.rows, :heads] = _attend_many(q, k_SNH, v_SNH, self._mask(span, q))
        return o_TQH

    def _mask(self, span: Span, q_TQH: Tensor) -> Tensor | None:
        """[T, S], 0 where a row may look, -inf where not; None when SDPA's own will do."""
        if span.start == 0:
            return None
        if span.first_row not in self._masks:
            shape = (span.num_rows, span.stop)
            future = torch.ones(shape, dtype=torch.bool, device=q_TQH.device)
            mask = torch.zeros(shape, dtype=q_TQH.dtype, device=q_TQH.device)
            mask.masked_fill_(future.triu_(span.start + 1), float("-inf"))
            self._masks[span.first_row] = mask
        return self._masks[span.first_row]


def _attend_one(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor) -> Tensor:
    # The query heads that share a kv head go in as that head's query rows: no copy of K and V.
    q_NRH = q_TQH.view(-1, k_SNH.shape[1], q_TQH.shape[2]).transpose(0, 1)
    o_NRH = F.scaled_dot_product_attention(
        q_NRH[None], k_SNH.transpose(0, 1)[None], v_SNH.transpose(0, 1)[None]
    )[0]
    return o_NRH.transpose(0, 1).reshape(q_TQH.shape)


def _attend_many(q_TQH: Tensor, k_SNH: Tensor, v_SNH: Tensor, mask: Tensor | None) -> Tensor:
    num_kv_heads = k_SNH.shape[1]
    k, v = k_SNH.transpose(0, 1)[None], v_SNH.transpose(0, 1)[None]
    outputs = []
    # Tile order: each run of n_kv query heads reads the kv heads one to one.
    for q_TNH in q_TQH.split(num_kv_heads, dim=1):
        q = q_TNH.transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        outputs.append(o[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
