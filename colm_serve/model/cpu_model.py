"""A CoLM as a CPU runs it fastest: packed weights, fused steps, buffers that stay.

The same function as `ColmModel`, for serving only: no gradients, no per-chain keys and values,
and one call at a time, since its buffers are used again. Layers run in `kernels.transformer_cpu`.

Shapes: T rows (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from colm_serve.kernels.packed_linear_cpu import Epilogue, Matrix, PackedLinear
from colm_serve.kernels.prefill_attention_cpu import Rows, attend_span
from colm_serve.kernels.rms_norm_cpu import chain_rms_norm
from colm_serve.kernels.transformer_cpu import (
    Batch,
    Buffers,
    Layers,
    attend_rows,
    attend_spans,
    finish_layer,
    run_layers,
    store_kv,
)
from colm_serve.model.config import ColmConfig
from colm_serve.model.paged import PagedContext
from colm_serve.model.rope import rotation_table
from colm_serve.model.transformer import ChainBlock, ColmModel


class Workspace:
    """Buffers of one pass, kept for the next; they grow to the largest pass there was."""

    def __init__(self, config: ColmConfig, num_chains: int) -> None:
        width = sum(config.chain_dims[:num_chains])
        num_heads = sum(config.heads_per_chain[:num_chains])
        qkv_width = (num_heads + 2 * config.num_kv_heads) * config.head_dim
        ff_width = sum(config.chain_ff_dims[:num_chains])
        self._widths = (width, width, qkv_width, num_heads * config.head_dim, ff_width)
        self._head_dim = config.head_dim
        self._num_rows = 0
        self.reserve(1)

    def reserve(self, num_rows: int) -> None:
        """Make room for a pass of this many rows; contents are lost when it has to grow."""
        if num_rows <= self._num_rows:
            return
        self._num_rows = num_rows
        # Zeros, not whatever was there: what no kernel writes must not be a NaN.
        x, h, qkv, o, ff = (torch.zeros(num_rows, width) for width in self._widths)
        qkv_TMH, o_TQH = (t.unflatten(1, (-1, self._head_dim)) for t in (qkv, o))
        self.x_TD, self.h_TD, self.qkv_TMH, self.o_TQH = x, h, qkv_TMH, o_TQH
        self.buffers = Buffers(*(t.numpy() for t in (x, h, qkv, qkv_TMH, o, o_TQH, ff)))


class CpuLayers:
    """Every layer's weights, packed."""

    def __init__(self, config: ColmConfig, num_chains: int, dtype: torch.dtype) -> None:
        dims = config.chain_dims[:num_chains]
        ff_dims = config.chain_ff_dims[:num_chains]
        q_dims = [heads * config.head_dim for heads in config.heads_per_chain[:num_chains]]
        kv_dim = config.num_kv_heads * config.head_dim
        keys = Matrix(0, 0, dims[0], sum(q_dims), kv_dim)
        values = Matrix(0, 0, dims[0], sum(q_dims) + kv_dim, kv_dim)
        up = Epilogue.GELU if config.ffn == "gelu" else Epilogue.SWIGLU
        pack = partial(PackedLinear, dtype=dtype, num_layers=config.num_layers)
        self._num_chains = num_chains
        self._qkv = pack([*_staircase(dims, q_dims), keys, values])
        self._out = pack(_staircase(q_dims, dims), epilogue=Epilogue.ADD)
        self._up = pack(_staircase(dims, ff_dims), epilogue=up)
        self._down = pack(_staircase(ff_dims, dims), epilogue=Epilogue.ADD)
        self.arrays = Layers(
            self._qkv.arrays,
            self._out.arrays,
            self._up.arrays,
            self._down.arrays,
            gains_LED=np.ones((config.num_layers, 2, sum(dims)), np.float32),
            first_columns=np.array([0, *accumulate(dims)]),
            first_key=sum(config.heads_per_chain[:num_chains]),
            eps=config.rms_norm_eps,
            rotations=rotation_table(config).numpy(),
        )

    def take(self, block: ChainBlock, chain: int) -> None:
        """Pack what a chain, counted from 1, adds to a layer."""
        i, layer = chain - 1, block.layer
        columns = slice(self.arrays.first_columns[i], self.arrays.first_columns[i + 1])
        for which, norm in enumerate((block.attn_norm, block.ffn_norm)):
            self.arrays.gains_LED[layer, which, columns] = norm.weights[i].detach().numpy()
        self._qkv.set(i, block.attn.wq.weights[i], layer=layer)
        if chain == 1:
            self._qkv.set(self._num_chains, block.attn.wk.weights[0], layer=layer)
            self._qkv.set(self._num_chains + 1, block.attn.wv.weights[0], layer=layer)
        self._out.set(i, block.attn.wo.weights[i], layer=layer)
        gated = None if block.ffn.w3 is None else block.ffn.w3.weights[i]
        self._up.set(i, block.ffn.w1.weights[i], gated, layer=layer)
        self._down.set(i, block.ffn.w2.weights[i], layer=layer)


class CpuModel:
    """The first `num_chains` chains of a CoLM, packed; implements `model.serving.ServingModel`.

    Positions are those of the context's spans; the tensor that says them too is not read.

    Args:
        config: "air", or one chain.
        num_chains: how many it holds; default all.
        with_head: without, it only prefills.
        dtype: how matrices are kept, see `PackedLinear`; sums, norms and embeddings are fp32.
    """

    device = torch.device("cpu")
    kv_dtype = torch.float32

    def __init__(
        self,
        config: ColmConfig,
        num_chains: int | None = None,
        *,
        with_head: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.num_chains = config.num_chains if num_chains is None else num_chains
        dims = config.chain_dims[: self.num_chains]
        self._layers = CpuLayers(config, self.num_chains, dtype)
        self._embeddings: list[Tensor] = []
        self._gains = np.ones(sum(dims), np.float32)
        self._head = PackedLinear(self._head_matrices(), dtype, Epilogue.ADD) if with_head else None
        self._workspace = Workspace(config, self.num_chains)

    @classmethod
    def pack(cls, model: ColmModel, dtype: torch.dtype = torch.float32) -> CpuModel:
        """A packed copy of a model whose weights are in memory."""
        packed = cls(model.config, model.num_chains, with_head=model.head is not None, dtype=dtype)
        for chain in range(1, model.num_chains + 1):
            packed.take_chain(model, chain)
        return packed

    def take_chain(self, model: ColmModel, chain: int) -> None:
        """Pack what a chain, counted from 1 and taken in order, adds."""
        i = chain - 1
        self._embeddings.append(model.embedding.weights[i].detach().float().clone())
        for block in model.blocks:
            assert isinstance(block, ChainBlock)
            self._layers.take(block, chain)
        if self._head is not None:
            assert model.norm is not None, "the model has no head"
            assert model.head is not None, "the model has no head"
            first, end = self._layers.arrays.first_columns[i : i + 2]
            self._gains[first:end] = model.norm.weights[i].detach().numpy()
            tied = model.config.tie_embeddings
            self._head.set(i, (model.embedding if tied else model.head).weights[i])

    def __call__(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        num_rows: Sequence[int],
        context: PagedContext,
    ) -> Tensor:
        """As `ColmModel.forward`, but for columns beyond a row's level, which may hold anything."""
        batch = self._begin(token_ids_T, num_rows, context)
        if context.on_layer is not None or context.sparsity is not None:
            for layer in range(self.config.num_layers):
                self.store_kv(layer, batch, context)
                self.finish_layer(layer, batch, context)
        else:
            self.run_layers(batch, context)
        buffers, layers = self._workspace.buffers, self._layers.arrays
        chain_rms_norm(
            buffers.x_TD, self._gains, layers.first_columns, batch.end_rows, layers.eps,
            buffers.h_TD, batch.num_threads,
        )  # fmt: skip
        return self._workspace.h_TD[: len(token_ids_T)].clone()

    def prefill(self, token_ids_T: Tensor, positions_T: Tensor, context: PagedContext) -> None:
        """As `ColmModel.prefill`."""
        batch = self._begin(token_ids_T, (len(token_ids_T),), context)
        last = self.config.num_layers - 1
        for layer in range(last):
            self.store_kv(layer, batch, context)
            self.finish_layer(layer, batch, context)
        self.store_kv(last, batch, context)

    def run_layers(self, batch: Batch, context: PagedContext) -> None:
        """All layers in one call."""
        run_layers(self._layers.arrays, self._workspace.buffers, batch, context.pool.array)

    def store_kv(self, layer: int, batch: Batch, context: PagedContext) -> None:
        """One layer up to its keys and values."""
        store_kv(self._layers.arrays, layer, self._workspace.buffers, batch, context.pool.array)
        context.stored(layer)

    def finish_layer(self, layer: int, batch: Batch, context: PagedContext) -> None:
        """One layer from its attention on."""
        layers, buffers, kv = self._layers.arrays, self._workspace.buffers, context.pool.array
        attend_rows(layers, layer, buffers, batch, kv)
        if context.sparsity is None:
            attend_spans(layer, buffers, batch, kv)
        else:
            self._attend_sparse(layer, batch, context)
        finish_layer(layers, layer, buffers, batch)

    def _attend_sparse(self, layer: int, batch: Batch, context: PagedContext) -> None:
        buffers, kv = self._workspace.buffers, context.pool.array[layer]
        for span, long in zip(context.rows.spans, batch.long, strict=True):
            *rows, first_page = map(int, long)
            queries = Rows(*rows)
            q_TQH = self._workspace.qkv_TMH[span.rows, : queries.num_heads]
            attend_span(
                buffers.qkv_TMH, queries, batch.pages[first_page:], batch.page_size, kv[0], kv[1],
                context.index(layer, span, q_TQH), buffers.o_TQH, batch.num_threads,
            )  # fmt: skip

    def logits(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """As `ColmModel.logits`."""
        assert self._head is not None, "a model without head only prefills"
        logits_TV = torch.zeros(x_TD.shape[0], self.config.vocab_size)
        end_rows = np.array(num_rows, dtype=np.int64)
        first_rows = np.zeros_like(end_rows)
        if self.config.head == "per_level":
            first_rows[:-1] = end_rows[1:]
        self._head(x_TD.numpy(), logits_TV.numpy(), first_rows, end_rows, _share_threads())
        return logits_TV

    def _begin(self, token_ids_T: Tensor, num_rows: Sequence[int], context: PagedContext) -> Batch:
        self._workspace.reserve(len(token_ids_T))
        columns = pairwise(self._layers.arrays.first_columns)
        for table, count, (first, end) in zip(self._embeddings, num_rows, columns, strict=False):
            self._workspace.x_TD[:count, first:end] = table[token_ids_T[:count]]
        rows = context.rows
        end_rows = np.array(num_rows, dtype=np.int64)
        return Batch(
            np.zeros_like(end_rows),
            end_rows,
            rows.positions,
            rows.slots,
            rows.num_heads,
            rows.single,
            rows.long,
            rows.page_starts,
            rows.pages,
            context.pool.page_size,
            _share_threads(),
        )

    def _head_matrices(self) -> list[Matrix]:
        config, dims = self.config, self.config.chain_dims[: self.num_chains]
        if config.head == "per_level":
            return [
                Matrix(i, 0, width, 0, config.vocab_size)
                for i, width in enumerate(accumulate(dims))
            ]
        # Level k's scores are the sum over its chains of what each one's columns give (3.4).
        return [
            Matrix(i, first, width, 0, config.vocab_size)
            for i, (first, width) in enumerate(zip([0, *accumulate(dims)], dims, strict=False))
        ]


def _share_threads() -> int:
    """Give the kernels that this thread calls as many threads as torch has."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    return num_threads


def _staircase(in_dims: Sequence[int], out_dims: Sequence[int]) -> list[Matrix]:
    """Chain i reads the inputs of chains up to its own (Algorithm 1)."""
    first_columns = [0, *accumulate(out_dims)]
    widths = zip(accumulate(in_dims), first_columns, out_dims, strict=False)
    return [Matrix(i, 0, width, column, out) for i, (width, column, out) in enumerate(widths)]
