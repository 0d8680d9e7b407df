"""Selectors find what was planted; indices keep each row's own key and stay causal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.engine.sparse.antidiagonal import Antidiagonal
from colm_serve.engine.sparse.head_keys import BlockGrid, HeadKeys, build_index
from colm_serve.engine.sparse.mass import keys_read, mass_kept
from colm_serve.engine.sparse.selectors import (
    AShape,
    BlockSparse,
    Dense,
    Selector,
    VerticalSlash,
    last_query_mass,
)
from colm_serve.engine.sparse.sparsity import select_keys
from colm_serve.kernels.paged_attention import attend
from colm_serve.kernels.sparse_attention import BLOCK, attend_sparse
from tests.engine.sparse.planted import on_blocks, on_broad_slash, on_column, on_slash

#: As much as each may choose: all keys, in sequences of up to 640 tokens.
FULL: tuple[Selector, ...] = (
    Dense(), AShape(0, 640), AShape(640, 0), VerticalSlash(0, 640), VerticalSlash(640, 0),
    BlockSparse(10), Antidiagonal(1.0),
)  # fmt: skip
FRUGAL: tuple[Selector, ...] = (
    AShape(0, 0), AShape(3, 20), VerticalSlash(0, 0), VerticalSlash(40, 120), BlockSparse(1),
    Antidiagonal(0.5),
)  # fmt: skip


def keys_of(selector: Selector, q_TH: torch.Tensor, k_SH: torch.Tensor) -> list[set[int]]:
    """The positions that each query block reads."""
    grid = BlockGrid(len(k_SH) - len(q_TH), len(k_SH))
    index = select_keys([selector], q_TH[:, None], k_SH[:, None], grid)
    blocks = range(grid.num_query_blocks)
    return [set(index.keys(0, block, len(k_SH)).tolist()) for block in blocks]


@pytest.mark.parametrize("start", [0, 64, 100, 319])
@pytest.mark.parametrize("selector", FULL, ids=str)
def test_a_full_budget_is_dense_attention(selector: Selector, start: int) -> None:
    torch.manual_seed(0)
    q_TQH, k_SNH, v_SNH = torch.randn(500, 4, 16), *torch.randn(2, 500, 2, 16)
    q_TQH = q_TQH[start:]
    index = select_keys([selector] * 4, q_TQH, k_SNH, BlockGrid(start, 500))
    expected = attend(q_TQH, k_SNH, v_SNH)
    torch.testing.assert_close(attend_sparse(q_TQH, k_SNH, v_SNH, index), expected)


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 300),
    num_rows=st.integers(1, 200),
    selector=st.sampled_from(FULL + FRUGAL),
    seed=st.integers(0, 9),
)
def test_every_index_is_sound(start: int, num_rows: int, selector: Selector, seed: int) -> None:
    """Own positions are kept, entries ascend, no column is beyond the rows or in a block."""
    torch.manual_seed(seed)
    stop = start + num_rows
    q_TQH, k_SNH = torch.randn(num_rows, 2, 8), torch.randn(stop, 1, 8)
    index = select_keys([selector] * 2, q_TQH, k_SNH, BlockGrid(start, stop))
    for head in range(2):
        for block, first_row in enumerate(range(0, num_rows, BLOCK)):
            own = np.arange(start + first_row, min(start + first_row + BLOCK, stop))
            assert np.isin(own, index.keys(head, block, stop)).all()
            blocks = index.key_blocks[slice(*index.block_starts[head, block : block + 2])]
            columns = index.columns[slice(*index.column_starts[head, block : block + 2])]
            assert (np.diff(blocks) > 0).all()
            assert (np.diff(columns) > 0).all()
            assert (blocks <= own[-1] // BLOCK).all()
            assert (columns <= own[-1]).all()
            assert not np.isin(columns // BLOCK, blocks).any()
    assert index.block_starts[-1, -1] == len(index.key_blocks)
    assert index.column_starts[-1, -1] == len(index.columns)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 300), num_rows=st.integers(1, 200), offset=st.integers(0, 400))
def test_a_slash_covers_the_key_of_every_row(start: int, num_rows: int, offset: int) -> None:
    grid = BlockGrid(start, start + num_rows)
    blocks_BJ = grid.slash_blocks(np.array([offset]))
    for row in range(num_rows):
        key = start + row - offset
        assert key < 0 or blocks_BJ[row // BLOCK, key // BLOCK]


def test_columns_inside_a_chosen_block_are_not_read_twice() -> None:
    grid = BlockGrid(128, 192)
    keys = HeadKeys(np.array([[True, False, False]]), np.array([3, 70, 130, 191]))
    index = build_index(grid, [keys])
    assert index.key_blocks.tolist() == [0, 2], "block 2 is the rows' own"
    assert index.columns.tolist() == [70]


def test_the_last_queries_mass_is_that_of_their_attention() -> None:
    torch.manual_seed(0)
    q_RH, k_SH = torch.randn(20, 16), torch.randn(90, 16)
    scores_RS = q_RH @ k_SH.T / 4
    scores_RS.masked_fill_(torch.ones(20, 90, dtype=torch.bool).triu_(71), float("-inf"))
    p_RS = scores_RS.softmax(1)
    slashes = torch.zeros(90)
    for row in range(20):
        for key in range(71 + row):
            slashes[70 + row - key] += p_RS[row, key]
    by_column_S, by_offset_S = last_query_mass(q_RH, k_SH)
    torch.testing.assert_close(by_column_S, p_RS.sum(0))
    torch.testing.assert_close(by_offset_S, slashes)


@pytest.mark.parametrize("selector", [VerticalSlash(31, 100), Antidiagonal(0.8)], ids=str)
def test_a_planted_column_is_found(selector: Selector) -> None:
    q_SH, k_SH = on_column(200, 640)
    assert all(200 in keys for keys in keys_of(selector, q_SH, k_SH)[4:])
    assert all(200 in keys for keys in keys_of(selector, q_SH[333:], k_SH))


def test_a_planted_slash_is_found() -> None:
    q_SH, k_SH = on_slash(300, 640)
    for block, keys in enumerate(keys_of(VerticalSlash(30, 101), q_SH[333:], k_SH)):
        first = 333 + BLOCK * block - 300
        assert set(range(first, min(first + BLOCK, 340))) <= keys


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_antidiagonals_keep_the_mass_of_a_broad_slash(gamma: float) -> None:
    """Of a slash one key wide they see too little: neighbours have to agree."""
    q_SH, k_SH = on_broad_slash(300, 640)
    q_TQH, k_SNH = q_SH[333:, None], k_SH[:, None]
    grid = BlockGrid(333, 640)
    index = select_keys([Antidiagonal(gamma)], q_TQH, k_SNH, grid)
    assert mass_kept(q_TQH, k_SNH, [index]).item() > gamma - 0.05
    assert keys_read(index, grid).item() < 0.5


@pytest.mark.parametrize("selector", [BlockSparse(1), Antidiagonal(0.8)], ids=str)
def test_planted_blocks_are_found(selector: Selector) -> None:
    q_SH, k_SH = on_blocks({5: 1, 7: 4, 9: 2}, 640)
    keys = keys_of(selector, q_SH, k_SH)
    for query_block, key_block in {5: 1, 7: 4, 9: 2}.items():
        assert set(range(64 * key_block, 64 * key_block + 64)) <= keys[query_block]


def test_a_shape_reads_its_two_ends_and_no_more() -> None:
    q_SH, k_SH = torch.randn(2, 640, 8)
    keys = keys_of(AShape(5, 65), q_SH, k_SH)[8]
    assert keys == {0, 1, 2, 3, 4, *range(448, 576)}


def test_a_lower_threshold_reads_fewer_keys() -> None:
    torch.manual_seed(0)
    q_SH, k_SH = torch.randn(2, 640, 32) * 2
    num_keys = [
        sum(map(len, keys_of(Antidiagonal(gamma), q_SH, k_SH))) for gamma in (0.3, 0.6, 0.9)
    ]
    assert num_keys == sorted(set(num_keys))
