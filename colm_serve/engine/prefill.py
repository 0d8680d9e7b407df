"""Compute chain 1's keys and values of several prompts' chunks in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.paged import PagedContext, Span, Sparsity
from colm_serve.model.serving import ServingModel


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, start + len(tokens)) of a prompt whose earlier KV stands in its pages."""

    tokens: Sequence[int]
    start: int
    table: BlockTable
    num_prompt_tokens: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@torch.inference_mode()
def run_prefill(
    model: ServingModel,
    pool: KvPool,
    chunks: Sequence[PrefillChunk],
    on_layer: Callable[[int], None] | None = None,
    sparsity: Sparsity | None = None,
) -> None:
    """Write every layer's K and V of the chunks into the pool (paper 4.4).

    Args:
        model: needs chain 1 only.
        on_layer: called with a layer's number once its K and V of all chunks are in the pool;
            what it raises ends the pass.
        sparsity: which keys the chunks of prompts of a known length attend to; default: all.
    """
    spans = []
    first_row = 0
    for chunk in chunks:
        num_rows, num_prompt_tokens = len(chunk.tokens), chunk.num_prompt_tokens
        spans.append(Span(chunk.table, first_row, num_rows, chunk.start, 1, num_prompt_tokens))
        first_row += num_rows
    device = model.device
    tokens = torch.tensor([t for chunk in chunks for t in chunk.tokens], device=device)
    positions = torch.cat([torch.arange(c.start, c.stop, device=device) for c in chunks])
    context = PagedContext(model.config, pool, spans, on_layer, sparsity)
    model.prefill(tokens, positions, context)
