from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.router.fair_queue import FairQueue

MAX_TOKENS = 100
EVEN = {"a": 1.0, "b": 1.0}


def queue_of(max_queued: int = 1000, weights: Mapping[str, float] = EVEN) -> FairQueue[str]:
    return FairQueue(max_queued, weights)


def drain(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_within_a_tenant_the_nearest_deadline_goes_first() -> None:
    queue = queue_of()
    for name, deadline_s in (("late", 9.0), ("soon", 1.0), ("then", 5.0), ("too", 5.0)):
        queue.push("a", 10, deadline_s, name)
    assert queue.head() == "soon"
    assert drain(queue) == ["soon", "then", "too", "late"]
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_tenant_that_comes_late_waits_for_no_backlog() -> None:
    queue = queue_of()
    for i in range(5):
        queue.push("a", 10, i, f"a{i}")
    assert queue.pop() == "a0"
    queue.push("b", 10, 99.0, "b0")
    assert queue.pop() == "b0"


def test_what_was_served_without_waiting_counts() -> None:
    queue = queue_of()
    queue.serve_at_once("a", 1000)
    queue.push("a", 1, 1.0, "a0")
    queue.push("b", 1, 2.0, "b0")
    assert drain(queue) == ["b0", "a0"]


def test_who_gives_up_has_had_nothing() -> None:
    queue = queue_of()
    queue.push("a", 1000, 1.0, "a0")
    queue.push("a", 10, 2.0, "a1")
    queue.push("b", 10, 3.0, "b0")
    queue.remove("a0")
    queue.remove("a0")
    assert (queue.num_waiting("a"), queue.num_waiting("b")) == (1, 1)
    assert drain(queue) == ["a1", "b0"]


def test_who_steps_aside_lets_others_by_and_keeps_its_place() -> None:
    queue = queue_of()
    for name, deadline_s in (("a0", 1.0), ("a1", 2.0), ("a2", 3.0)):
        queue.push("a", 10, deadline_s, name)
    queue.set_aside("a0")
    assert queue.pop() == "a1"
    queue.recall("a0")
    assert drain(queue) == ["a0", "a2"]
    queue.recall("a0")
    assert queue.head() is None


def test_who_stood_aside_is_owed_nothing_for_it() -> None:
    queue = queue_of()
    queue.push("a", 10, 1.0, "a0")
    queue.set_aside("a0")
    for i in range(9):
        queue.push("b", 10, float(i), f"b{i}")
    assert [queue.pop() for _ in range(5)] == [f"b{i}" for i in range(5)]
    queue.recall("a0")
    queue.push("a", 10, 2.0, "a1")
    queue.push("a", 10, 3.0, "a2")
    assert [name[0] for name in drain(queue)[:6]].count("a") == 3, "in turn, not all at once"


def test_when_full_whoever_has_most_for_its_weight_makes_room() -> None:
    queue = queue_of(4, {"a": 1.0, "b": 3.0})
    for i in range(4):
        assert queue.push("a", 10, float(i), f"a{i}") is None
    assert queue.push("b", 10, 99.0, "b0") == "a3"
    assert queue.push("a", 10, 0.5, "a4") == "a2", "what is due last goes, not what comes last"
    assert queue.push("a", 10, 50.0, "a5") == "a5"
    assert queue.push("b", 10, 99.0, "b1") == "a1"
    assert len(queue) == 4


def test_a_queue_of_none_takes_none() -> None:
    assert queue_of(0).push("a", 1, 1.0, "a0") == "a0"


Costs = st.lists(st.integers(1, MAX_TOKENS), min_size=30, max_size=60)


@given(
    st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 7.0]) for name in "abc"}),
    st.fixed_dictionaries(dict.fromkeys("abc", Costs)),
)
def test_tenants_that_wait_share_by_weight_and_none_starves(
    weights: dict[str, float], costs: dict[str, list[int]]
) -> None:
    """The paper's bound: to within one request of each, for every pair and at every moment."""
    queue = queue_of(weights=weights)
    for name, sizes in costs.items():
        for i, size in enumerate(sizes):
            queue.push(name, size, float(i), f"{name}{i}")
    served: Counter[str] = Counter()
    while all(queue.num_waiting(name) for name in "abc"):
        item = queue.pop()
        served[item[0]] += costs[item[0]][int(item[1:])]
        for one, other in ("ab", "bc", "ac"):
            apart = abs(served[one] / weights[one] - served[other] / weights[other])
            assert apart <= MAX_TOKENS / weights[one] + MAX_TOKENS / weights[other]


Steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "pop", "remove", "serve", "aside", "recall"]),
        st.sampled_from("ab"),
        st.integers(1, MAX_TOKENS),
        st.integers(0, 20),
    ),
    max_size=80,
)


@given(Steps)
def test_it_stays_bounded_and_loses_nobody(
    steps: list[tuple[str, str, int, int]],
) -> None:
    queue = queue_of(10)
    waiting: set[str] = set()
    aside: set[str] = set()
    for i, (what, tenant, num_tokens, number) in enumerate(steps):
        if what == "push":
            waiting.add(f"{tenant}{i}")
            waiting -= {queue.push(tenant, num_tokens, float(number), f"{tenant}{i}") or ""}
        elif what == "pop" and waiting - aside:
            head = queue.head()
            assert queue.pop() == head
            waiting.remove(head or "")
        elif what == "remove" and waiting:
            gone = sorted(waiting)[number % len(waiting)]
            queue.remove(gone)
            waiting.remove(gone)
        elif what == "aside" and waiting - aside:
            queue.set_aside(queue.head() or "")
            aside = {name for name in waiting if queue._places[name][1].is_aside}
        elif what == "recall" and aside:
            queue.recall(min(aside))
            aside.remove(min(aside))
        elif what == "serve" and not waiting:
            queue.serve_at_once(tenant, num_tokens)
        aside &= waiting
        assert (queue.head() is None) == (waiting == aside)
        assert len(queue) == len(waiting) <= 10
        assert sum(queue.num_waiting(name) for name in "ab") == len(waiting)
    for name in aside:
        queue.recall(name)
    assert set(drain(queue)) == waiting
