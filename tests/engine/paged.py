"""A pool to run a model over, and the whole model's keys and values to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from colm_serve.core import SamplingParams
from colm_serve.engine.loading import kv_layout
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.sampler import Run
from colm_serve.engine.step import Segment, run_pass
from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.attention import CausalContext
from colm_serve.model.checkpoint import LoadedModel, load_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel, level_rows
from tests.helpers import GREEDY, sample_rows, whole_model

PAGE_SIZE = 16
#: Pages of three sequences: scattered, neighbours, and in falling order.
PAGES = ((9, 2, 30, 5, 17, 21), (10, 11, 12, 13, 14, 15), (29, 28, 27, 26, 25, 24))


class RecordingContext(CausalContext):
    """Attends as usual and keeps every layer's keys and values."""

    def __init__(self, config: ColmConfig, seq_len: int) -> None:
        super().__init__(config, seq_len)
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, k_TNH: Tensor, v_TNH: Tensor) -> None:
        self.stored[layer] = (k_TNH, v_TNH)
        super().store(layer, k_TNH, v_TNH)


@torch.inference_mode()
def kv_of_whole_model(
    folder: Path, tokens: Sequence[int], level: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of every layer, as the whole model makes them when it runs at `level`."""
    model = whole_model(folder)
    num_tokens = len(tokens)
    context = RecordingContext(model.config, num_tokens)
    num_rows = [rows * num_tokens for rows in level_rows([level])]
    model(torch.tensor(tokens), torch.arange(num_tokens), num_rows, context)
    return context.stored


@cache
def open_chain_1(folder: Path) -> LoadedModel[ColmModel]:
    return load_model(folder, 1, with_head=False)


def poisoned_pool(folder: Path) -> KvPool:
    """A pool whose unwritten slots are NaN, so that reading one of them shows."""
    layout = kv_layout(open_chain_1(folder))
    pool = KvPool(layout, 32, PAGE_SIZE)
    nan = torch.full((32 * PAGE_SIZE, layout.num_kv_heads, layout.head_dim), float("nan"))
    for layer in range(layout.num_layers):
        pool.write(layer, pool.table(range(32)), 0, nan, nan)
    return pool


def prefill(
    model: ServingModel, pool: KvPool, table: BlockTable, tokens: Sequence[int], cuts: Sequence[int]
) -> None:
    """Compute `tokens` in chunks that end at each of `cuts` and at the end."""
    start = 0
    for stop in (*cuts, len(tokens)):
        if chunk := tokens[start:stop]:
            run_prefill(model, pool, [PrefillChunk(chunk, start, table)])
            start = stop


def decode_row(tokens: Sequence[int], level: int, table: BlockTable) -> Segment:
    """The last of the tokens, the others' K and V standing in the pages."""
    return Segment(tokens[-1:], len(tokens) - 1, level, table)


def decode(
    model: ServingModel,
    pool: KvPool,
    table: BlockTable,
    prompt: Sequence[int],
    levels: Sequence[int],
    sampling: SamplingParams = GREEDY,
) -> list[int]:
    """Steps of one row after a prefill of all but the prompt's last token."""
    tokens = list(prompt)
    for level in levels:
        scores = run_pass(model, pool, [decode_row(tokens, level, table)])
        tokens += sample_rows(scores.logits_SV, Run(sampling, len(tokens)))
    return tokens[len(prompt) :]
