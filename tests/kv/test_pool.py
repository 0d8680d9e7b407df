"""Block tables and the pool's memory, against a naive mapping of each token by itself."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import KvLayout
from colm_serve.kv.pool import BlockTable, KvPool

PAGE_SIZE = 4
SCATTERED = (5, 1, 7, 2)
CONSECUTIVE = (2, 3, 4, 5)


@given(st.data(), st.permutations(list(range(9))), st.integers(0, 9), st.integers(1, 5))
def test_slots_are_those_of_each_token_in_turn(
    data: st.DataObject, pages: list[int], num_pages: int, page_size: int
) -> None:
    table = BlockTable(tuple(pages[:num_pages]), page_size)
    start = data.draw(st.integers(0, num_pages * page_size))
    stop = data.draw(st.integers(start, num_pages * page_size))
    naive = [pages[t // page_size] * page_size + t % page_size for t in range(start, stop)]
    slices = list(table.slots(start, stop))
    assert [slot for part in slices for slot in range(part.stop)[part]] == naive
    for left, right in pairwise(slices):
        assert left.stop != right.start, "neighbours were not joined"


def test_tokens_beyond_the_pages_are_refused() -> None:
    with pytest.raises(AssertionError, match="beyond the pages"):
        list(BlockTable((3,), 4).slots(0, 5))


def make_pool(dtype: str) -> KvPool:
    return KvPool(KvLayout(num_layers=2, num_kv_heads=3, head_dim=4, dtype=dtype), 8, PAGE_SIZE)


def make_kv(pool: KvPool, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, num_tokens, pool.layout.num_kv_heads, pool.layout.head_dim)
    k, v = torch.randn(shape, generator=torch.Generator().manual_seed(num_tokens))
    dtype: torch.dtype = getattr(torch, pool.layout.dtype)
    return k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pages", [SCATTERED, CONSECUTIVE])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 16), (0, 3), (3, 9), (7, 1)])
def test_read_gives_back_what_was_written(
    dtype: str, pages: tuple[int, ...], start: int, num_tokens: int
) -> None:
    pool = make_pool(dtype)
    table = pool.table(pages)
    k, v = make_kv(pool, num_tokens)
    pool.write(1, table, start, k, v)
    k_read, v_read = pool.read(1, table, start, start + num_tokens)
    assert torch.equal(k_read, k)
    assert torch.equal(v_read, v)
    assert torch.equal(pool.read_keys(1, table, start + num_tokens)[start:], k)
    assert not pool.read(0, table, 0, 16)[0].any(), "another layer was written"


def test_writing_a_sequence_leaves_the_pages_of_others_alone() -> None:
    pool = make_pool("float32")
    others = pool.table((0, 3, 4, 6))
    k_other, v_other = make_kv(pool, 16)
    pool.write(0, others, 0, k_other, v_other)
    k, v = make_kv(pool, 14)
    pool.write(0, pool.table(SCATTERED), 1, k, v)
    assert torch.equal(pool.read(0, others, 0, 16)[0], k_other)
    assert torch.equal(pool.read(0, others, 0, 16)[1], v_other)
    assert not pool.read(0, pool.table(SCATTERED), 0, 1)[0].any()
    assert not pool.read(0, pool.table(SCATTERED), 15, 16)[0].any()


def test_consecutive_pages_are_read_without_a_copy() -> None:
    pool = make_pool("float32")
    table = pool.table(CONSECUTIVE)
    k, _ = pool.read(0, table, 0, 16)
    fresh, zeros = torch.ones(16, 3, 4), torch.zeros(16, 3, 4)
    pool.write(0, table, 0, fresh, zeros)
    assert torch.equal(k, fresh)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_what_is_no_number_is_seen_among_the_tokens_asked_for(which: int, value: float) -> None:
    pool = make_pool("float32")
    table = pool.table([3, 0])
    k_v = make_kv(pool, 8)
    k_v[which][5, -1, 0] = value
    pool.write(pool.layout.num_layers - 1, table, 0, *k_v)
    assert pool.are_numbers(table, 0, 5)
    assert not pool.are_numbers(table, 0, 6)
    assert not pool.are_numbers(table, 5, 8)
    assert pool.are_numbers(table, 6, 8)


def test_bytes_per_token_follow_the_dtype() -> None:
    assert make_pool("float32").num_bytes_per_token == 2 * 3 * 4 * 4
    assert make_pool("bfloat16").num_bytes_per_token == 2 * 3 * 4 * 2
