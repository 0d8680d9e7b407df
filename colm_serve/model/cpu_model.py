"""A CoLM as a CPU runs it fastest: packed weights, fused steps, buffers that stay.

The same function as `ColmModel`, for serving only: no gradients, no per-chain keys and values,
and one call at a time, since its buffers are used again. A block is eight kernel calls:
norm; q, k and v of all chains in one; rotation and KV store; attention; output projection added
to the residual; norm; both halves of the feed-forward with their gate; its second matrix added.

Shapes: T rows (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from colm_serve.kernels.packed_linear_cpu import Epilogue, Matrix, PackedLinear
from colm_serve.kernels.paged_attention import attend
from colm_serve.kernels.paged_attention_cpu import attend as attend_rows
from colm_serve.kernels.paged_attention_cpu import rotate_and_store
from colm_serve.kernels.rms_norm_cpu import chain_rms_norm
from colm_serve.model.config import ColmConfig
from colm_serve.model.paged import PagedContext
from colm_serve.model.rope import rotation_table
from colm_serve.model.transformer import ChainBlock, ColmModel


class Workspace:
    """Buffers of one pass, kept for the next; they grow to the largest pass there was."""

    def __init__(self, widths: dict[str, int], head_dim: int) -> None:
        self._widths = widths
        self._head_dim = head_dim
        self._num_rows = 0
        self.reserve(1)

    def reserve(self, num_rows: int) -> None:
        """Make room for a pass of this many rows; contents are lost when it has to grow."""
        if num_rows > self._num_rows:
            self._num_rows = num_rows
            # Zeros, not whatever was there: what no kernel writes must not be a NaN.
            self.tensors = {
                name: torch.zeros(num_rows, width) for name, width in self._widths.items()
            }
            for name in ("qkv", "o"):
                by_head = self.tensors[name].unflatten(1, (-1, self._head_dim))
                self.tensors[f"{name}_heads"] = by_head
            self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}


class _Rows:
    """How many rows each chain touches in this pass, as the kernels take it, and the threads."""

    def __init__(self, num_rows: Sequence[int]) -> None:
        self.counts = np.array(num_rows, dtype=np.int64)
        self.zeros = np.zeros_like(self.counts)
        self.num_threads = torch.get_num_threads()
        # One setting for torch and for our kernels; it belongs to the calling thread.
        numba.set_num_threads(min(self.num_threads, numba.config.NUMBA_NUM_THREADS))


class CpuBlock:
    """One transformer layer (Figure 12)."""

    def __init__(self, config: ColmConfig, num_chains: int, layer: int, dtype: torch.dtype) -> None:
        dims = config.chain_dims[:num_chains]
        ff_dims = config.chain_ff_dims[:num_chains]
        q_dims = [heads * config.head_dim for heads in config.heads_per_chain[:num_chains]]
        kv_dim = config.num_kv_heads * config.head_dim
        self.layer = layer
        self.kv_column = sum(q_dims)
        self._first_key = sum(config.heads_per_chain[:num_chains])
        self._eps = config.rms_norm_eps
        self._first_columns = np.array([0, *accumulate(dims)])
        self._gains = [np.ones(sum(dims), np.float32) for _ in range(2)]
        keys = Matrix(0, 0, dims[0], self.kv_column, kv_dim)
        values = Matrix(0, 0, dims[0], self.kv_column + kv_dim, kv_dim)
        up = Epilogue.GELU if config.ffn == "gelu" else Epilogue.SWIGLU
        self._qkv = PackedLinear([*_staircase(dims, q_dims), keys, values], dtype)
        self._out = PackedLinear(_staircase(q_dims, dims), dtype, Epilogue.ADD)
        self._up = PackedLinear(_staircase(dims, ff_dims), dtype, up)
        self._down = PackedLinear(_staircase(ff_dims, dims), dtype, Epilogue.ADD)

    def take(self, block: ChainBlock, chain: int, num_chains: int) -> None:
        """Pack what a chain, counted from 1, adds to this layer."""
        i = chain - 1
        columns = slice(self._first_columns[i], self._first_columns[i + 1])
        self._gains[0][columns] = block.attn_norm.weights[i].detach().numpy()
        self._gains[1][columns] = block.ffn_norm.weights[i].detach().numpy()
        self._qkv.set(i, block.attn.wq.weights[i])
        if chain == 1:
            self._qkv.set(num_chains, block.attn.wk.weights[0])
            self._qkv.set(num_chains + 1, block.attn.wv.weights[0])
        self._out.set(i, block.attn.wo.weights[i])
        gated = None if block.ffn.w3 is None else block.ffn.w3.weights[i]
        self._up.set(i, block.ffn.w1.weights[i], gated)
        self._down.set(i, block.ffn.w2.weights[i])

    def run(
        self, buffers: Workspace, rows: _Rows, rotations: np.ndarray, context: PagedContext
    ) -> None:
        """Run the layer on the residual stream x of the buffers."""
        self.store_kv(buffers, rows, rotations, context)
        self._attend(buffers, rows, context)
        x, h, o, ff = (buffers.arrays[name] for name in ("x", "h", "o", "ff"))
        self._out(o, x, rows.zeros, rows.counts, rows.num_threads)
        self._norm(x, 1, h, rows)
        self._up(h, ff, rows.zeros, rows.counts, rows.num_threads)
        self._down(ff, x, rows.zeros, rows.counts, rows.num_threads)

    def store_kv(
        self, buffers: Workspace, rows: _Rows, rotations: np.ndarray, context: PagedContext
    ) -> None:
        """Queries into their buffer, keys and values into the pool."""
        x, h, qkv = (buffers.arrays[name] for name in ("x", "h", "qkv"))
        self._norm(x, 0, h, rows)
        self._qkv(h, qkv, rows.zeros, rows.counts, rows.num_threads)
        index = context.rows
        k_CNH, v_CNH = context.pool.arrays(self.layer)
        rotate_and_store(
            buffers.arrays["qkv_heads"], index.num_heads, self._first_key, index.positions,
            index.slots, rotations, k_CNH, v_CNH, rows.num_threads,
        )  # fmt: skip
        context.stored(self.layer)

    def _attend(self, buffers: Workspace, rows: _Rows, context: PagedContext) -> None:
        index, pool = context.rows, context.pool
        k_CNH, v_CNH = pool.arrays(self.layer)
        attend_rows(
            buffers.arrays["qkv_heads"], index.single, index.num_heads, index.positions,
            index.page_starts, index.pages, pool.page_size, k_CNH, v_CNH,
            buffers.arrays["o_heads"], rows.num_threads,
        )  # fmt: skip
        q_TMH, o_TQH = buffers.tensors["qkv_heads"], buffers.tensors["o_heads"]
        for span, heads in index.long:
            k_SNH, v_SNH = pool.read(self.layer, span.table, 0, span.stop)
            o_TQH[span.rows, :heads] = attend(q_TMH[span.rows, :heads], k_SNH, v_SNH)

    def _norm(self, x: np.ndarray, which: int, out: np.ndarray, rows: _Rows) -> None:
        chain_rms_norm(
            x, self._gains[which], self._first_columns, rows.counts, self._eps, out,
            rows.num_threads,
        )  # fmt: skip


class CpuModel:
    """The first `num_chains` chains of a CoLM, packed; implements `model.serving.ServingModel`.

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
        self.blocks = [
            CpuBlock(config, self.num_chains, layer, dtype) for layer in range(config.num_layers)
        ]
        self._embeddings: list[Tensor] = []
        self._gains = np.ones(sum(dims), np.float32)
        self._first_columns = np.array([0, *accumulate(dims)])
        self._head = PackedLinear(self._head_matrices(), dtype, Epilogue.ADD) if with_head else None
        self._rotations = rotation_table(config).numpy()
        self._buffers = Workspace(
            {
                "x": sum(dims),
                "h": sum(dims),
                "qkv": self.blocks[0].kv_column + 2 * config.num_kv_heads * config.head_dim,
                "o": self.blocks[0].kv_column,
                "ff": sum(config.chain_ff_dims[: self.num_chains]),
            },
            config.head_dim,
        )

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
        for packed, block in zip(self.blocks, model.blocks, strict=True):
            assert isinstance(block, ChainBlock)
            packed.take(block, chain, self.num_chains)
        if self._head is not None:
            assert model.norm is not None, "the model has no head"
            assert model.head is not None, "the model has no head"
            columns = slice(self._first_columns[i], self._first_columns[i + 1])
            self._gains[columns] = model.norm.weights[i].detach().numpy()
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
        rows = self._begin(token_ids_T, num_rows)
        for block in self.blocks:
            block.run(self._buffers, rows, self._rotations, context)
        x, h = self._buffers.arrays["x"], self._buffers.arrays["h"]
        chain_rms_norm(
            x, self._gains, self._first_columns, rows.counts, self.config.rms_norm_eps, h,
            rows.num_threads,
        )  # fmt: skip
        return self._buffers.tensors["h"][: token_ids_T.shape[0]].clone()

    def prefill(self, token_ids_T: Tensor, positions_T: Tensor, context: PagedContext) -> None:
        """As `ColmModel.prefill`."""
        rows = self._begin(token_ids_T, (token_ids_T.shape[0],))
        for block in self.blocks[:-1]:
            block.run(self._buffers, rows, self._rotations, context)
        self.blocks[-1].store_kv(self._buffers, rows, self._rotations, context)

    def logits(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """As `ColmModel.logits`."""
        assert self._head is not None, "a model without head only prefills"
        logits_TV = torch.zeros(x_TD.shape[0], self.config.vocab_size)
        rows = _Rows(num_rows)
        first_rows = rows.zeros
        if self.config.head == "per_level":
            first_rows[:-1] = rows.counts[1:]
        self._head(x_TD.numpy(), logits_TV.numpy(), first_rows, rows.counts, rows.num_threads)
        return logits_TV

    def _begin(self, token_ids_T: Tensor, num_rows: Sequence[int]) -> _Rows:
        self._buffers.reserve(token_ids_T.shape[0])
        x_TD = self._buffers.tensors["x"]
        for table, count, (first, end) in zip(
            self._embeddings, num_rows, pairwise(self._first_columns), strict=False
        ):
            x_TD[:count, first:end] = table[token_ids_T[:count]]
        return _Rows(num_rows)

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


def _staircase(in_dims: Sequence[int], out_dims: Sequence[int]) -> list[Matrix]:
    """Chain i reads the inputs of chains up to its own (Algorithm 1)."""
    first_columns = [0, *accumulate(out_dims)]
    widths = zip(accumulate(in_dims), first_columns, out_dims, strict=False)
    return [Matrix(i, 0, width, column, out) for i, (width, column, out) in enumerate(widths)]
