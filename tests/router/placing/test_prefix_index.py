from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.router.placing.prefix_index import MAX_HOLDERS, PrefixIndex, block_hashes

BLOCK = 4
MANY_PAGES = 1000


def hashes(text: str, salt: str = "") -> tuple[int, ...]:
    return block_hashes([ord(letter) for letter in text], BLOCK, salt)


def index_of(*workers: int, num_pages: int = MANY_PAGES, max_blocks: int = 1000) -> PrefixIndex:
    index = PrefixIndex(max_blocks)
    for worker in workers:
        index.join(worker, num_pages)
    return index


@pytest.mark.parametrize(
    ("one", "other", "num_shared"),
    [
        ("aaaabbbb", "aaaabbbbcccc", 2),
        ("aaaabbbb", "aaaabbbbcc", 2),  # only full blocks
        ("aaaabbbb", "aaaabbbc", 1),
        ("aaaabbbb", "ccccbbbb", 0),  # the same block after another one is another block
        ("aaa", "aaa", 0),
    ],
)
def test_hashes_agree_on_the_full_blocks_of_a_shared_prefix(
    one: str, other: str, num_shared: int
) -> None:
    pairs = list(zip(hashes(one), hashes(other), strict=False))
    assert [a == b for a, b in pairs] == [i < num_shared for i in range(len(pairs))]


def test_prompts_of_another_salt_share_nothing() -> None:
    assert hashes("aaaabbbb", "mine")[0] != hashes("aaaabbbb", "yours")[0]


def test_the_longest_match_comes_first() -> None:
    index = index_of(1, 2, 3)
    index.add(1, hashes("aaaa"))
    index.add(2, hashes("aaaabbbbcccc"))
    index.add(3, hashes("aaaabbbbdddd"))
    assert index.matches(hashes("aaaabbbbcccceeee"), 8) == {2: 3, 3: 2, 1: 1}
    assert list(index.matches(hashes("aaaabbbbcccceeee"), 2)) == [2, 3]
    assert index.matches(hashes("bbbb"), 8) == {}


def test_who_has_left_is_passed_over_and_nobody_else() -> None:
    index = index_of(1, 2)
    for worker in (1, 2):
        index.add(worker, hashes("aaaabbbb"))
    index.leave(1)
    assert index.matches(hashes("aaaabbbb"), 8) == {2: 2}
    index.add(1, hashes("aaaabbbb"))
    assert index.matches(hashes("aaaabbbb"), 8) == {2: 2}, "it is not there to have anything"


def test_a_worker_forgets_what_its_pages_cannot_hold() -> None:
    index = index_of(1, num_pages=4)
    index.add(1, hashes("aaaabbbb"))
    index.add(1, hashes("cccc"))
    index.add(1, hashes("dddd"))
    assert index.matches(hashes("aaaabbbb"), 8) == {1: 2}
    index.add(1, hashes("aaaabbbb"))  # used again, so that it stays longest
    index.add(1, hashes("eeeeffffgggg"))
    assert index.matches(hashes("aaaabbbb"), 8) == {1: 2}
    assert index.matches(hashes("cccc"), 8) == {}
    assert index.matches(hashes("eeeeffffgggg"), 8) == {1: 3}


def test_the_least_recently_used_blocks_are_forgotten_leaves_first() -> None:
    index = index_of(1, max_blocks=3)
    index.add(1, hashes("aaaabbbb"))
    index.add(1, hashes("cccc"))
    index.add(1, hashes("aaaa"))
    index.add(1, hashes("dddd"))
    assert len(index) == 3
    assert index.matches(hashes("aaaabbbb"), 8) == {1: 1}
    assert index.matches(hashes("cccc"), 8) == {1: 1}


@given(
    st.lists(st.tuples(st.integers(0, 30), st.text("ab", max_size=24)), max_size=60),
    st.text("ab", max_size=24),
)
def test_it_stays_bounded_and_matches_only_what_was_placed(
    placed: list[tuple[int, str]], prompt: str
) -> None:
    index = index_of(*range(30), max_blocks=20)
    for worker, text in placed:
        index.add(worker, hashes(text))
    assert len(index) <= 20
    assert all(len(holders) <= MAX_HOLDERS for holders in index._blocks.values())
    for worker, num_blocks in index.matches(hashes(prompt), 8).items():
        prefix = prompt[: num_blocks * BLOCK]
        assert any(w == worker and text.startswith(prefix) for w, text in placed)
