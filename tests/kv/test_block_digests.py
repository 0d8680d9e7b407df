"""Chained block digests: equal exactly when the prefixes and the root are."""

from __future__ import annotations

from itertools import zip_longest

from hypothesis import given
from hypothesis import strategies as st

from colm_serve.kv.ledger import block_digests

tokens_lists = st.lists(st.integers(0, 3), max_size=24)
page_sizes = st.integers(1, 5)


@given(tokens_lists, tokens_lists, page_sizes)
def test_digests_agree_exactly_as_far_as_the_prefixes_do(
    a: list[int], b: list[int], page_size: int
) -> None:
    pairs = zip_longest(block_digests(a, page_size, b"w"), block_digests(b, page_size, b"w"))
    for index, (digest_a, digest_b) in enumerate(pairs, start=1):
        stop = index * page_size
        is_same = a[:stop] == b[:stop] and len(a) >= stop and len(b) >= stop
        assert (digest_a == digest_b) == is_same


@given(tokens_lists, page_sizes)
def test_only_full_blocks_have_a_digest(tokens: list[int], page_size: int) -> None:
    assert len(block_digests(tokens, page_size, b"w")) == len(tokens) // page_size


@given(st.lists(st.integers(0, 3), min_size=6, max_size=24), page_sizes)
def test_another_root_shares_no_digest(tokens: list[int], page_size: int) -> None:
    ours = set(block_digests(tokens, page_size, b"weights"))
    theirs = set(block_digests(tokens, page_size, b"other weights"))
    assert ours
    assert not ours & theirs


def test_the_order_of_blocks_matters() -> None:
    assert block_digests([1, 2, 3, 4], 2, b"w")[1] != block_digests([3, 4, 1, 2], 2, b"w")[0]


def test_large_token_ids_do_not_collide() -> None:
    assert block_digests([2**32], 1, b"w") != block_digests([0], 1, b"w")
