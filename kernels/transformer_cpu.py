"""A transformer's layers on a CPU in one call, so that no interpreter runs between its kernels.

A layer is norm; q, k and v of all chains; rotation and KV store; attention; output projection
added to the residual; norm; both halves of the feed-forward, gated; its second matrix added
(Figure 12). The weights that stream by leave nothing in a core's cache, an interpreter's objects
included, so every return to Python between kernels begins with misses.

Shapes: T rows (tokens), D model width, L layers, Q query heads, N kv heads, M heads of all kinds,
H head dim, C slots of the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from colm_serve.kernels.jit_cpu import kernel
from colm_serve.kernels.packed_linear_cpu import PackedArrays, multiply
from colm_serve.kernels.paged_attention_cpu import attend, rotate_and_store
from colm_serve.kernels.prefill_attention_cpu import Rows, attend_span
from colm_serve.kernels.rms_norm_cpu import chain_rms_norm

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
IntTable = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class Layers(NamedTuple):
    """What the layers are made of; every array has the layers first."""

    qkv: PackedArrays  # queries, then keys, then values
    out: PackedArrays
    up: PackedArrays
    down: PackedArrays
    gains_LED: np.ndarray  # [L, 2, D]: before attention, before the feed-forward
    first_columns: Ints  # where each chain begins, and where the last one ends
    first_key: int  # head of `Buffers.qkv_TMH` at which the keys begin
    eps: float
    rotations: np.ndarray  # `model.rope.rotation_table`


class Buffers(NamedTuple):
    """The activations of a pass; at least T rows each."""

    x_TD: np.ndarray  # the residual stream
    h_TD: np.ndarray
    qkv_T: np.ndarray
    qkv_TMH: np.ndarray  # the same memory by heads
    o_T: np.ndarray
    o_TQH: np.ndarray  # the same memory by heads
    ff_T: np.ndarray


class Batch(NamedTuple):
    """Which rows a pass has, highest level first, and where their tokens stand."""

    first_rows: Ints  # 0 for each active chain
    end_rows: Ints  # rows that each active chain touches
    positions_T: Ints
    slots_T: Ints
    num_heads_T: Ints  # query heads of each row's level
    single: Ints  # rows to attend with one by one
    long: IntTable  # spans to attend with as a whole: `Rows`, then where their pages begin
    page_starts_T: Ints
    pages: Ints
    page_size: int
    num_threads: int


@kernel()
def run_layers(layers, buffers, batch, kv_LECNH):
    """Take the residual stream through every layer; all rows attend to every key.

    Args:
        kv_LECNH: the pool, [L, 2, C, N, H].
    """
    for layer in range(len(kv_LECNH)):
        store_kv(layers, layer, buffers, batch, kv_LECNH)
        attend_rows(layers, layer, buffers, batch, kv_LECNH)
        attend_spans(layer, buffers, batch, kv_LECNH)
        finish_layer(layers, layer, buffers, batch)


@kernel()
def store_kv(layers, layer, buffers, batch, kv_LECNH):
    """A layer's queries into their buffer, its keys and values into the pool."""
    threads = batch.num_threads
    chain_rms_norm(
        buffers.x_TD, layers.gains_LED[layer, 0], layers.first_columns, batch.end_rows,
        layers.eps, buffers.h_TD, threads,
    )  # fmt: skip
    multiply(
        layers.qkv, layer, buffers.h_TD, buffers.qkv_T, batch.first_rows, batch.end_rows, threads
    )
    rotate_and_store(
        buffers.qkv_TMH, batch.num_heads_T, layers.first_key, batch.positions_T, batch.slots_T,
        layers.rotations, kv_LECNH[layer, 0], kv_LECNH[layer, 1], threads,
    )  # fmt: skip


@kernel()
def attend_rows(layers, layer, buffers, batch, kv_LECNH):
    """Attention of the rows in `batch.single`."""
    attend(
        buffers.qkv_TMH, batch.single, batch.num_heads_T, batch.positions_T, batch.page_starts_T,
        batch.pages, batch.page_size, kv_LECNH[layer, 0], kv_LECNH[layer, 1], buffers.o_TQH,
        batch.num_threads,
    )  # fmt: skip


@kernel()
def attend_spans(layer, buffers, batch, kv_LECNH):
    """Attention of the spans in `batch.long` to every key."""
    for i in range(len(batch.long)):
        first, count, start, num_heads, first_page = batch.long[i]
        attend_span(
            buffers.qkv_TMH, Rows(first, count, start, num_heads), batch.pages[first_page:],
            batch.page_size, kv_LECNH[layer, 0], kv_LECNH[layer, 1], None, buffers.o_TQH,
            batch.num_threads,
        )  # fmt: skip


@kernel()
def finish_layer(layers, layer, buffers, batch):
    """Output projection and feed-forward, each added to the residual stream."""
    first, end, threads = batch.first_rows, batch.end_rows, batch.num_threads
    multiply(layers.out, layer, buffers.o_T, buffers.x_TD, first, end, threads)
    chain_rms_norm(
        buffers.x_TD, layers.gains_LED[layer, 1], layers.first_columns, end, layers.eps,
        buffers.h_TD, threads,
    )  # fmt: skip
    multiply(layers.up, layer, buffers.h_TD, buffers.ff_T, first, end, threads)
    multiply(layers.down, layer, buffers.ff_T, buffers.x_TD, first, end, threads)
