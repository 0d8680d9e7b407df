"""Causal attention of a long span on a CPU, over keys and values where their pages lie.

Flash attention: a block of 64 rows of one query head takes its keys a group at a time and keeps
each row's maximum, sum and weighted values, so no more memory than a group's scores is needed.
Scores stand transposed, keys by rows: a tile's lanes are rows of queries, its rows are keys read
in place, and weighting the values needs nothing turned or gathered either. Dense and sparse
attention differ only in which keys make up the groups.

A row's result depends neither on the other rows of its span nor on where the span begins.

Shapes: T rows, Q query heads, N kv heads, M heads of all kinds, H head dim, C slots of the pool,
B query blocks, G keys of a group, W lanes (rows of half a query block).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from colm_serve.kernels.jit_cpu import kernel
from colm_serve.kernels.math_cpu import exp
from colm_serve.kernels.sparse_attention import BLOCK as QUERY_BLOCK
from colm_serve.kernels.tile_cpu import BLOCK as LANES
from colm_serve.kernels.tile_cpu import TILE_ROWS, score_tile, value_tile

#: Keys of a group; a multiple of a key block, so that listing every block changes nothing.
_GROUP = 128
#: With the padding that completes the last tile.
_ROOM = -(-_GROUP // TILE_ROWS) * TILE_ROWS
_PARTS = QUERY_BLOCK // LANES
#: The score of a key that a row does not see.
_HIDDEN = np.float32(-1e30)
#: Where a group's padding stands: after every row.
_NOWHERE = np.iinfo(np.int64).max


class Rows(NamedTuple):
    """A span of rows: consecutive tokens of one sequence."""

    first: int
    num_rows: int
    start: int  # position of the first of them
    num_heads: int  # query heads of their level


class _State(NamedTuple):
    """What half a query block knows of the keys so far."""

    queries_HW: np.ndarray
    values_HW: np.ndarray
    maxima_W: np.ndarray
    sums_W: np.ndarray


class _Group(NamedTuple):
    """Keys taken together, in the order of the index."""

    slots_G: np.ndarray
    positions_G: np.ndarray


class _Scratch(NamedTuple):
    scores_GW: np.ndarray
    tile: np.ndarray
    factors_W: np.ndarray


@kernel(parallel=True)
def attend_span(q_TMH, rows, pages, page_size, k_CNH, v_CNH, index, out_TQH, num_threads):
    """As `kernels.paged_attention.attend`, or `attend_sparse` of that index.

    Args:
        q_TMH: each row's rotated query heads, from head 0.
        rows: `Rows`.
        pages: int64, the pages of the rows' sequence in the order of its tokens.
        index: `SparseIndex`; None attends to every key.
        out_TQH: fp32; the heads of the rows' level are written.
        num_threads: among which blocks of rows are shared out.
    """
    ends = _share_items(rows, index, k_CNH.shape[1], num_threads)
    for thread in prange(num_threads):
        head_dim = k_CNH.shape[2]
        memory = _aligned(LANES * (2 * head_dim + 2) * _PARTS + LANES * (_ROOM + TILE_ROWS + 1))
        scratch = _Scratch(
            _take(memory, 0, _ROOM), _take(memory, _ROOM, TILE_ROWS),
            _take(memory, _ROOM + TILE_ROWS, 1)[0],
        )  # fmt: skip
        first_state = _ROOM + TILE_ROWS + 1
        group = _Group(np.empty(_ROOM, np.int64), np.empty(_ROOM, np.int64))
        for item in range(ends[thread], ends[thread + 1]):
            head, block = _head_and_block(item, rows, k_CNH.shape[1])
            _attend_block(
                q_TMH[:, head], rows, block, head, pages, page_size,
                k_CNH[:, head % k_CNH.shape[1]], v_CNH[:, head % k_CNH.shape[1]], index,
                out_TQH[:, head], memory[first_state * LANES :], scratch, group,
            )  # fmt: skip


@kernel()
def _aligned(count):
    """Floats at the start of a cache line, as tiles load them."""
    memory = np.empty(count + 16, np.float32)
    skipped = (-memory.ctypes.data % 64) // 4
    return memory[skipped : skipped + count]


@kernel()
def _take(memory, first, count):
    return memory[first * LANES : (first + count) * LANES].reshape(count, LANES)


@kernel()
def _share_items(rows, index, num_kv_heads, num_threads):
    """Where each thread's items begin: the same number of keys to each, as nearly as may be."""
    num_items = rows.num_heads * ((rows.num_rows + QUERY_BLOCK - 1) // QUERY_BLOCK)
    total = 0
    for item in range(num_items):
        total += _num_keys(item, rows, index, num_kv_heads)
    ends = np.full(num_threads + 1, num_items)
    ends[0] = 0
    done, thread = 0, 1
    for item in range(num_items):
        if thread < num_threads and done * num_threads >= total * thread:
            ends[thread] = item
            thread += 1
        done += _num_keys(item, rows, index, num_kv_heads)
    return ends


@kernel()
def _num_keys(item, rows, index, num_kv_heads):
    head, block = _head_and_block(item, rows, num_kv_heads)
    if index is None:
        return rows.start + min((block + 1) * QUERY_BLOCK, rows.num_rows)
    num_blocks = index.block_starts[head, block + 1] - index.block_starts[head, block]
    num_columns = index.column_starts[head, block + 1] - index.column_starts[head, block]
    return num_blocks * QUERY_BLOCK + num_columns


@kernel()
def _head_and_block(item, rows, num_kv_heads):
    """Items that read one kv head are neighbours; query head j reads kv head j % N."""
    num_blocks = (rows.num_rows + QUERY_BLOCK - 1) // QUERY_BLOCK
    num_repeats = rows.num_heads // num_kv_heads
    kv_head, rest = divmod(item, num_repeats * num_blocks)
    block, repeat = divmod(rest, num_repeats)
    return repeat * num_kv_heads + kv_head, block


@kernel()
def _attend_block(
    q_TH, rows, block, head, pages, page_size, k_CH, v_CH, index, out_TH, memory, scratch, group
):  # fmt: skip
    head_dim = k_CH.shape[1]
    first_row = rows.first + block * QUERY_BLOCK
    num_rows = min(QUERY_BLOCK, rows.num_rows - block * QUERY_BLOCK)
    first_position = rows.start + block * QUERY_BLOCK
    for part in range(_PARTS):
        _begin(_state(memory, part, head_dim), q_TH, first_row, num_rows, part)
    stop = first_position + num_rows
    if index is None:
        for first in range(0, stop, _GROUP):
            count = _add_run(group, 0, first, min(first + _GROUP, stop), pages, page_size)
            _attend_group(group, count, first_position, num_rows, k_CH, v_CH, memory, scratch)
    else:
        count = 0
        for i in range(index.block_starts[head, block], index.block_starts[head, block + 1]):
            first = index.key_blocks[i] * QUERY_BLOCK
            count = _add_run(group, count, first, min(first + QUERY_BLOCK, stop), pages, page_size)
            if count > _GROUP - QUERY_BLOCK:
                _attend_group(group, count, first_position, num_rows, k_CH, v_CH, memory, scratch)
                count = 0
        for i in range(index.column_starts[head, block], index.column_starts[head, block + 1]):
            position = index.columns[i]
            count = _add_run(group, count, position, min(position + 1, stop), pages, page_size)
            if count == _GROUP:
                _attend_group(group, count, first_position, num_rows, k_CH, v_CH, memory, scratch)
                count = 0
        if count:
            _attend_group(group, count, first_position, num_rows, k_CH, v_CH, memory, scratch)
    for part in range(_PARTS):
        _finish(_state(memory, part, head_dim), out_TH, first_row, num_rows, part)


@kernel()
def _state(memory, part, head_dim):
    first = part * (2 * head_dim + 2)
    return _State(
        _take(memory, first, head_dim), _take(memory, first + head_dim, head_dim),
        _take(memory, first + 2 * head_dim, 1)[0], _take(memory, first + 2 * head_dim + 1, 1)[0],
    )  # fmt: skip


@kernel()
def _begin(state, q_TH, first_row, num_rows, part):
    head_dim = len(state.queries_HW)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for lane in range(LANES):
        row = part * LANES + lane
        for i in range(head_dim):
            # Lanes without a row see what the first one does; nobody reads them.
            state.queries_HW[i, lane] = q_TH[first_row + row, i] * scale if row < num_rows else 0
    state.values_HW[:] = 0
    state.maxima_W[:] = _HIDDEN
    state.sums_W[:] = 0


@kernel()
def _finish(state, out_TH, first_row, num_rows, part):
    for lane in range(min(LANES, num_rows - part * LANES)):
        out = out_TH[first_row + part * LANES + lane]
        for i in range(len(out)):
            out[i] = state.values_HW[i, lane] / state.sums_W[lane]


@kernel()
def _add_run(group, count, first, stop, pages, page_size):
    """Append positions [first, stop); returns how many the group has then."""
    position = first
    while position < stop:
        page, offset = divmod(position, page_size)
        length = min(page_size - offset, stop - position)
        slot = pages[page] * page_size + offset
        for i in range(length):
            group.slots_G[count + i] = slot + i
            group.positions_G[count + i] = position + i
        position += length
        count += length
    return count


@kernel()
def _attend_group(group, count, first_position, num_rows, k_CH, v_CH, memory, scratch):
    padded = (count + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    for i in range(count, padded):
        group.slots_G[i], group.positions_G[i] = group.slots_G[count - 1], _NOWHERE
    for part in range(_PARTS):
        first, stop = part * LANES, min((part + 1) * LANES, num_rows)
        num_keys = padded
        # Keys are ascending but for the columns, so what no row sees is mostly at the end.
        while num_keys and _tile_first(group, num_keys - TILE_ROWS) >= first_position + stop:
            num_keys -= TILE_ROWS
        if first < stop and num_keys:
            state = _state(memory, part, k_CH.shape[1])
            _attend_part(group, num_keys, first_position + first, k_CH, v_CH, state, scratch)


@kernel()
def _tile_first(group, key):
    """The least position of a tile's keys."""
    least = group.positions_G[key]
    for i in range(key + 1, key + TILE_ROWS):
        least = min(least, group.positions_G[i])
    return least


@kernel()
def _tile_last(group, key):
    last = group.positions_G[key]
    for i in range(key + 1, key + TILE_ROWS):
        last = max(last, group.positions_G[i])
    return last


@kernel()
def _attend_part(group, num_keys, first_position, k_CH, v_CH, state, scratch):
    scores_GW, maxima_W, factors_W = scratch.scores_GW, state.maxima_W, scratch.factors_W
    for lane in range(LANES):
        factors_W[lane] = maxima_W[lane]
    for key in range(0, num_keys, TILE_ROWS):
        tile_GW = scores_GW[key : key + TILE_ROWS]
        score_tile(state.queries_HW, k_CH, group.slots_G[key:], TILE_ROWS, tile_GW)
        if _tile_last(group, key) > first_position:
            _hide(tile_GW, group.positions_G[key:], first_position, _HIDDEN)
        _raise_maxima(tile_GW, maxima_W)
    for lane in range(LANES):
        factors_W[lane] = exp(factors_W[lane] - maxima_W[lane])
        state.sums_W[lane] *= factors_W[lane]
    for key in range(0, num_keys, TILE_ROWS):
        tile_GW = scores_GW[key : key + TILE_ROWS]
        _weigh(tile_GW, maxima_W)
        if _tile_last(group, key) > first_position:
            _hide(tile_GW, group.positions_G[key:], first_position, np.float32(0))
        _add_weights(tile_GW, state.sums_W)
    head_dim = k_CH.shape[1]
    for column in range(0, head_dim, TILE_ROWS):
        num_columns = min(TILE_ROWS, head_dim - column)
        value_tile(scores_GW, v_CH, group.slots_G, num_keys, column, num_columns, scratch.tile)
        for i in range(num_columns):
            for lane in range(LANES):
                values = state.values_HW[column + i, lane] * factors_W[lane]
                state.values_HW[column + i, lane] = values + scratch.tile[i, lane]


@kernel()
def _hide(tile_GW, positions, first_position, value):
    """Set what rows at `first_position` and on do not see."""
    for i in range(TILE_ROWS):
        for lane in range(LANES):
            if positions[i] > first_position + lane:
                tile_GW[i, lane] = value


@kernel()
def _raise_maxima(tile_GW, maxima_W):
    for lane in range(LANES):
        highest = maxima_W[lane]
        for i in range(TILE_ROWS):
            score = tile_GW[i, lane]
            highest = score if score > highest else highest
        maxima_W[lane] = highest


@kernel(fastmath={"contract"})
def _weigh(tile_GW, maxima_W):
    for i in range(TILE_ROWS):
        for lane in range(LANES):
            tile_GW[i, lane] = exp(tile_GW[i, lane] - maxima_W[lane])


@kernel()
def _add_weights(tile_GW, sums_W):
    for lane in range(LANES):
        total = sums_W[lane]
        for i in range(TILE_ROWS):
            total += tile_GW[i, lane]
        sums_W[lane] = total
