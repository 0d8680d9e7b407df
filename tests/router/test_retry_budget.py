from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colm_serve.router.retry_budget import MIN_PER_S, RetryBudget


def test_it_begins_full_and_is_used_up() -> None:
    budget = RetryBudget(share=0.5, burst=3, now=0.0)
    assert [budget.take(0.0) for _ in range(5)] == [True, True, True, False, False]


def test_requests_bring_their_share() -> None:
    budget = RetryBudget(share=0.25, burst=1, now=0.0)
    assert budget.take(0.0)
    for _ in range(3):
        budget.add_request()
        assert not budget.take(0.0)
    budget.add_request()
    assert budget.take(0.0)


def test_time_brings_a_few_and_how_long_that_takes_is_told() -> None:
    budget = RetryBudget(share=0.0, burst=1, now=0.0)
    assert budget.wait_s(0.0) == 0
    assert budget.take(0.0)
    assert budget.wait_s(0.0) == 1 / MIN_PER_S
    assert not budget.take(0.5 / MIN_PER_S)
    assert budget.take(1.5 / MIN_PER_S)


def test_no_more_than_the_burst_is_saved() -> None:
    budget = RetryBudget(share=1.0, burst=2, now=0.0)
    for _ in range(10):
        budget.add_request()
    assert budget.num_left(1000.0) == 2


@given(
    steps=st.lists(st.tuples(st.booleans(), st.floats(0, 0.2)), max_size=200),
    share=st.floats(0, 1),
    burst=st.integers(1, 20),
)
def test_retries_stay_within_what_requests_and_time_have_brought(
    steps: list[tuple[bool, float]], share: float, burst: int
) -> None:
    budget, now, num_requests, num_retries = RetryBudget(share, burst, 0.0), 0.0, 0, 0
    for is_request, gap_s in steps:
        now += gap_s
        if is_request:
            num_requests += 1
            budget.add_request()
        else:
            num_retries += budget.take(now)
        assert num_retries <= burst + share * num_requests + MIN_PER_S * now + 1e-6
