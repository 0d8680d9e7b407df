"""A block shared by two processes, as docs/tensor-parallel.md says: interleaved row blocks.

The processes are simulated: what they would all-reduce is added up here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from colm_serve.model.attention import CausalContext
from colm_serve.model.config import ColmConfig
from colm_serve.model.layers import ChainLinear
from colm_serve.model.rope import rotation_table
from colm_serve.model.transformer import ChainBlock, level_rows

NUM_PROCESSES = 2
SEQ_LEN = 6
AIR = ColmConfig(
    vocab_size=16, chains=(1, 1, 2), d_model=64, d_ff=64, num_layers=1, num_heads=16,
    num_kv_heads=2, head_dim=4, max_context=SEQ_LEN,
)  # fmt: skip
PER_CHAIN = replace(AIR, kv_sharing="per_chain", num_kv_heads=8)


def share(config: ColmConfig) -> ColmConfig:
    """What each process's block is: a whole block of fewer heads and a narrower feed-forward."""
    return replace(
        config,
        num_heads=config.num_heads // NUM_PROCESSES,
        num_kv_heads=config.num_kv_heads // NUM_PROCESSES,
        d_ff=config.d_ff // NUM_PROCESSES,
    )


def take(width: int, num_repeats: int, rank: int) -> Tensor:
    """A process's part of a chain's `width` columns, which repeat a pattern so many times."""
    columns = torch.arange(width).reshape(num_repeats, NUM_PROCESSES, -1)
    return columns[:, rank].flatten()


def split_outputs(whole: ChainLinear, part: ChainLinear, repeats: Sequence[int], rank: int) -> None:
    """Of every chain's rows, a process's share: its outputs are the same chains, narrower."""
    for weight, target, num_repeats in zip(whole.weights, part.weights, repeats, strict=True):
        target.copy_(weight[take(weight.shape[0], num_repeats, rank)])


def split_inputs(
    whole: ChainLinear, part: ChainLinear, widths: Sequence[int], repeats: Sequence[int], rank: int
) -> None:
    """Of every chain's columns, those whose inputs a process has; outputs are to be added."""
    for i, (weight, target) in enumerate(zip(whole.weights, part.weights, strict=True)):
        blocks = weight.split(widths[: i + 1], dim=1)
        kept = [
            block[:, take(block.shape[1], num_repeats, rank)]
            for block, num_repeats in zip(blocks, repeats, strict=False)
        ]
        target.copy_(torch.cat(kept, dim=1))


def block_of(config: ColmConfig, whole: ChainBlock, rank: int) -> ChainBlock:
    part = ChainBlock(share(config), config.num_chains, 0)
    kv_heads = config.kv_heads_per_chain
    # Query head j of a chain reads kv head j % n_kv, so a process has whole groups of both.
    read = kv_heads * config.num_chains if config.kv_sharing == "air" else kv_heads
    repeats = [q // kv for q, kv in zip(config.heads_per_chain, read, strict=True)]
    once = [1] * config.num_chains
    q_widths = [heads * config.head_dim for heads in config.heads_per_chain]
    split_outputs(whole.attn.wq, part.attn.wq, repeats, rank)
    split_outputs(whole.attn.wk, part.attn.wk, once[: len(kv_heads)], rank)
    split_outputs(whole.attn.wv, part.attn.wv, once[: len(kv_heads)], rank)
    split_inputs(whole.attn.wo, part.attn.wo, q_widths, repeats, rank)
    assert whole.ffn.w3 is not None
    assert part.ffn.w3 is not None
    split_outputs(whole.ffn.w1, part.ffn.w1, once, rank)
    split_outputs(whole.ffn.w3, part.ffn.w3, once, rank)
    split_inputs(whole.ffn.w2, part.ffn.w2, config.chain_ff_dims, once, rank)
    return part


@pytest.mark.parametrize("config", [AIR, PER_CHAIN], ids=["air", "per_chain"])
@torch.no_grad()
def test_two_processes_compute_a_block_with_two_sums(config: ColmConfig) -> None:
    torch.manual_seed(0)
    whole = ChainBlock(config, config.num_chains, 0)
    parts = [block_of(config, whole, rank) for rank in range(NUM_PROCESSES)]
    num_rows = [rows * SEQ_LEN for rows in level_rows([3, 2, 2, 1])]
    x_TD = torch.randn(num_rows[0], config.d_model)
    cos_sin = rotation_table(config)[torch.arange(SEQ_LEN).repeat(4)]
    expected = whole(x_TD, num_rows, cos_sin, CausalContext(config, SEQ_LEN))

    h = whole.attn_norm(x_TD, num_rows)
    contexts = [CausalContext(share(config), SEQ_LEN) for _ in parts]
    x_TD = x_TD + sum(
        part.attn(0, h, num_rows, cos_sin, context)
        for part, context in zip(parts, contexts, strict=True)
    )
    h = whole.ffn_norm(x_TD, num_rows)
    x_TD = x_TD + sum(part.ffn(h, num_rows) for part in parts)
    for i, rows in enumerate(num_rows):
        columns = slice(sum(config.chain_dims[:i]), sum(config.chain_dims[: i + 1]))
        torch.testing.assert_close(x_TD[:rows, columns], expected[:rows, columns])


def test_every_process_holds_and_computes_as_much() -> None:
    matrices = [p for p in ChainBlock(AIR, 3, 0).parameters() if p.ndim == 2]
    part = [p for p in ChainBlock(share(AIR), 3, 0).parameters() if p.ndim == 2]
    assert sum(p.numel() for p in part) * NUM_PROCESSES == sum(p.numel() for p in matrices)
