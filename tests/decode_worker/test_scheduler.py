"""The decode scheduler case by case: admission, turns, budgets, preemption, sharing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import FinishReason
from colm_serve.decode_worker.sequence import Stage
from colm_serve.decode_worker.turn import Outcome
from colm_serve.errors import InvalidArgument, ResourceExhausted
from tests.decode_worker.scheduling import (
    EOS,
    PAGE_SIZE,
    admit_running,
    chunks_of,
    make_request,
    make_scheduler,
    rows_of,
    run_to_end,
    run_to_preemption,
    ship_and_start,
    take_turn,
)


def test_admission_reserves_prompt_and_output() -> None:
    scheduler = make_scheduler(num_pages=3)
    sequence = scheduler.admit(make_request([1] * 7, max_tokens=3))
    assert len(sequence.pages) == 3
    assert (sequence.num_prefill, sequence.num_missing) == (6, 6)
    with pytest.raises(ResourceExhausted, match="1 KV pages wanted, 0 of 3 free"):
        scheduler.admit(make_request([1], max_tokens=1))
    scheduler.cancel(sequence)
    scheduler.admit(make_request([1], max_tokens=1))


def test_admission_reserves_no_more_output_than_is_to_be_expected() -> None:
    scheduler = make_scheduler(num_pages=8, expected_output_tokens=5)
    first = scheduler.admit(make_request([1] * 7, max_tokens=20))
    assert len(first.pages) == 3
    assert len(scheduler.admit(make_request([1] * 7, max_tokens=2)).pages) == 3
    # The first may need another page soon, so a third must leave one.
    with pytest.raises(ResourceExhausted, match="2 KV pages wanted, 2 of 8 free, 1 of them for"):
        scheduler.admit(make_request([1] * 6, max_tokens=2))
    scheduler.admit(make_request([1] * 2, max_tokens=2))


def test_what_fits_no_empty_pool_is_refused_for_good() -> None:
    scheduler = make_scheduler(num_pages=3, expected_output_tokens=1)
    with pytest.raises(InvalidArgument, match="max_tokens"):
        scheduler.admit(make_request([1] * 8, max_tokens=5))


def test_too_many_waiting_are_refused() -> None:
    scheduler = make_scheduler(max_waiting=2)
    first, _ = scheduler.admit(make_request([1])), scheduler.admit(make_request([1]))
    with pytest.raises(ResourceExhausted, match="2 requests are already waiting"):
        scheduler.admit(make_request([1]))
    ship_and_start(scheduler, first)
    scheduler.admit(make_request([1]))


def test_a_refused_admission_lets_go_of_the_prefix_it_found() -> None:
    scheduler = make_scheduler(num_pages=4)
    run_to_end(scheduler, admit_running(scheduler, [1] * 9, 1))
    blocker = scheduler.admit(make_request([2] * 4, 2))
    with pytest.raises(ResourceExhausted):
        scheduler.admit(make_request([1] * 12, 4))
    scheduler.cancel(blocker)
    scheduler.check_integrity()
    assert scheduler.admit(make_request([1] * 12, 4)).num_cached > 0


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (13, 8)]
)
def test_whole_blocks_before_the_last_token_are_shared(num_tokens: int, num_cached: int) -> None:
    scheduler = make_scheduler()
    first = admit_running(scheduler, range(20, 29))
    second = scheduler.admit(make_request(range(20, 20 + num_tokens)))
    assert second.num_cached == num_cached
    shared = num_cached // PAGE_SIZE
    assert second.pages[:shared] == first.pages[:shared]
    assert not set(second.pages[shared:]) & set(first.pages)


def test_nothing_is_shared_between_cache_salts() -> None:
    scheduler = make_scheduler()
    found = [
        ship_and_start(scheduler, scheduler.admit(make_request([5] * 9, cache_salt=salt)))
        for salt in ("", "a", "b", "", "a", "b")
    ]
    assert [sequence.num_cached for sequence in found] == [0, 0, 0, 8, 8, 8]


def test_kv_that_has_not_come_is_not_shared() -> None:
    scheduler = make_scheduler()
    scheduler.admit(make_request([5] * 9))
    assert scheduler.admit(make_request([5] * 9)).num_cached == 0


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    run_to_end(scheduler, admit_running(scheduler, [5] * 6, max_tokens=6), token=3)
    # 12 tokens fill three blocks, but the last was never run: two have all of their KV.
    assert scheduler.admit(make_request([5] * 6 + [3] * 6 + [8])).num_cached == 8


@pytest.mark.parametrize(
    ("token", "ignore_eos", "reason"),
    [
        (EOS, False, FinishReason.STOP),
        (EOS, True, FinishReason.LENGTH),
        (1, False, FinishReason.LENGTH),
    ],
)
def test_why_a_sequence_ends(token: int, ignore_eos: bool, reason: FinishReason) -> None:
    scheduler = make_scheduler()
    request = make_request([1, 2], max_tokens=2, ignore_eos=ignore_eos)
    ship_and_start(scheduler, scheduler.admit(request))
    reasons = []
    while scheduler.has_work:
        _, (outcome,) = take_turn(scheduler, token)
        assert outcome is not None
        reasons.append(outcome.reason)
    assert reasons[-1] is reason
    assert reasons[:-1] == [None] * (0 if reason is FinishReason.STOP else 1)


def test_rows_stand_highest_level_first_and_prompts_last() -> None:
    scheduler = make_scheduler()
    for level in (1, 3, 2, 3):
        admit_running(scheduler, [1], level=level)
    scheduler.start(scheduler.admit(make_request([1] * 9, level=3)))
    turn = scheduler.next_turn()
    assert [(part.level, part.num_scored) for part in turn.slices] == [
        (3, 1), (3, 1), (2, 1), (1, 1), (1, 0),
    ]  # fmt: skip
    assert scheduler.num_running(3) == (1, 1, 2)


@given(st.integers(1, 5), st.integers(1, 14), st.data())
def test_all_sequences_take_turns(max_rows: int, num_sequences: int, data: st.DataObject) -> None:
    scheduler = make_scheduler(max_rows=max_rows, max_waiting=20)
    sequences = [
        admit_running(scheduler, [1], max_tokens=15, level=data.draw(st.integers(1, 3)))
        for _ in range(num_sequences)
    ]
    for _ in range(10):
        turn, _ = take_turn(scheduler)
        assert len(turn.slices) == min(max_rows, num_sequences)
        lengths = Counter(len(sequence.tokens) for sequence in sequences)
        assert max(lengths) - min(lengths) <= 1, "one is starved"


def test_prompts_computed_here_share_the_budget() -> None:
    scheduler = make_scheduler()
    long, short = scheduler.admit(make_request([1] * 60)), scheduler.admit(make_request([2] * 8))
    for sequence in (long, short):
        scheduler.start(sequence)
    assert chunks_of(take_turn(scheduler)[0]) == [(short, 5), (long, 5)]
    assert chunks_of(take_turn(scheduler)[0]) == [(short, 2), (long, 8)]
    turn, _ = take_turn(scheduler)
    assert (rows_of(turn), chunks_of(turn)) == ([short], [(long, 9)])


def test_a_full_batch_does_not_stop_a_prompt_nor_many_prompts_one() -> None:
    scheduler = make_scheduler(num_pages=90, max_rows=4, max_batch_tokens=5)
    for _ in range(6):
        admit_running(scheduler, [1], max_tokens=50)
    prompts = [scheduler.admit(make_request([2] * 4)), scheduler.admit(make_request([3] * 6))]
    for sequence in prompts:
        scheduler.start(sequence)
    for _ in range(8):
        turn, _ = take_turn(scheduler)
        assert len(rows_of(turn)) == 4
        assert sum(part.num_tokens for part in turn.slices) == 5
    assert prompts[0].stage is prompts[1].stage is Stage.RUNNING


def test_drafts_are_verified_within_budget_and_length() -> None:
    scheduler = make_scheduler(max_batch_tokens=7)
    first, second = admit_running(scheduler, [1], 9), admit_running(scheduler, [2], 3)
    first.num_drafts = second.num_drafts = 4
    turn = scheduler.next_turn()
    assert [part.num_tokens for part in turn.slices] == [5, 2], "5 tokens beside the two rows"
    assert scheduler.complete_turn([(7,), (7, 8)]) == [Outcome((7,), None), Outcome((7, 8), None)]
    turn = scheduler.next_turn()
    assert [part.num_tokens for part in turn.slices] == [5, 1], "one is left to make"
    scheduler.complete_turn([(7, 7, 7, EOS, 7), (8,)])
    assert first.tokens == [1, 7, 7, 7, 7, EOS], "what comes after the end is dropped"
    assert first.stage is second.stage is Stage.FINISHED
    assert second.tokens == [2, 7, 8, 8]


def test_output_beyond_the_expected_takes_page_by_page() -> None:
    scheduler = make_scheduler(num_pages=8, expected_output_tokens=2)
    sequence = admit_running(scheduler, [1] * 3, max_tokens=20)
    sizes = []
    while sequence.stage is not Stage.FINISHED:
        sizes.append(len(sequence.pages))
        take_turn(scheduler)
    assert sizes == [2] * 7 + [3] * 4 + [4] * 4 + [5] * 4 + [6]
    assert scheduler.num_preemptions == 0


def test_the_youngest_is_preempted_and_loses_nothing_but_time() -> None:
    scheduler = make_scheduler(num_pages=4, expected_output_tokens=1)
    old, young = admit_running(scheduler, [1] * 3, 12), admit_running(scheduler, [2] * 3, 9)
    for token in (5, 6):
        take_turn(scheduler, token)
    turn = run_to_preemption(scheduler)
    assert turn.preempted == (young,)
    assert rows_of(turn) == [old]
    assert (young.stage, young.pages, young.num_computed) == (Stage.WAITING, (), 0)
    assert young.tokens == [2, 2, 2, 5, 6, 1, 1, 1, 1]
    with pytest.raises(ResourceExhausted, match="1 preempted requests wait for KV pages"):
        scheduler.admit(make_request([1], 1))
    run_to_end(scheduler, young)
    assert old.stage is Stage.FINISHED
    assert (len(old.tokens), len(young.tokens)) == (15, 12)
    assert (young.num_preemptions, old.num_preemptions, scheduler.num_preemptions) == (1, 0, 1)
    scheduler.check_integrity()


def test_what_was_computed_is_found_again_after_a_preemption() -> None:
    scheduler = make_scheduler(num_pages=9, expected_output_tokens=1)
    old, young = admit_running(scheduler, [1] * 15, 17), admit_running(scheduler, [2] * 12, 8)
    assert run_to_preemption(scheduler).preempted == (young,)
    assert len(young.tokens) == 17
    take_turn(scheduler)
    scheduler.cancel(old)
    assert take_turn(scheduler)[0].readmitted == (young,)
    assert young.num_computed == 12, "the block whose page was taken is lost, three are not"


def test_nobodys_pages_are_taken_while_others_may_write_into_them() -> None:
    scheduler = make_scheduler(num_pages=4, expected_output_tokens=1)
    old = admit_running(scheduler, [1] * 7, 8)
    young = scheduler.admit(make_request([2] * 3, 1))
    while len(old.tokens) < 13:
        take_turn(scheduler)
    turn, _ = take_turn(scheduler)
    assert not turn.slices
    assert not turn.preempted
    assert not scheduler.has_work, "it would turn in circles"
    ship_and_start(scheduler, young)
    assert scheduler.has_work
    assert take_turn(scheduler)[0].preempted == (young,)
    run_to_end(scheduler, young)
    assert len(old.tokens) == 15


def test_who_is_held_takes_no_step_and_is_no_work() -> None:
    scheduler = make_scheduler(max_rows=2)
    held, *others = (admit_running(scheduler, [i], max_tokens=6) for i in range(3))
    held.is_held = True
    for _ in range(2):
        assert rows_of(take_turn(scheduler)[0]) == others
    for other in others:
        other.is_held = True
    assert not scheduler.has_work
    assert scheduler.num_running(1) == (3,)
    scheduler.resume(held)
    assert scheduler.has_work
    assert rows_of(take_turn(scheduler)[0]) == [held]
    scheduler.cancel(held)
    for other in others:
        scheduler.resume(other)
        run_to_end(scheduler, other)
    scheduler.check_integrity()


def test_a_step_that_makes_no_token_is_taken_again() -> None:
    scheduler = make_scheduler()
    sequence = admit_running(scheduler, [1, 2, 3])
    first = scheduler.next_turn()
    assert scheduler.complete_turn([()]) == [Outcome((), None)]
    assert scheduler.next_turn() == first
    assert scheduler.complete_turn([(5,)]) == [Outcome((5,), None)]
    assert (sequence.tokens, sequence.num_computed) == ([1, 2, 3, 5], 3)


def test_a_row_that_sits_out_does_not_hold_up_those_that_lack_nothing() -> None:
    scheduler = make_scheduler(num_pages=5, max_rows=1, expected_output_tokens=4)
    older = scheduler.admit(make_request([3], 3))
    stuck = admit_running(scheduler, [1] * 4, 16)
    scheduler.admit(make_request([2] * 3, 1))
    while scheduler.has_work:
        take_turn(scheduler)
    assert len(stuck.tokens) == 13
    ship_and_start(scheduler, older)
    run_to_end(scheduler, older)
    assert len(stuck.tokens) == 13


def test_drafts_are_cut_before_anyone_is_preempted_for_them() -> None:
    scheduler = make_scheduler(num_pages=5, expected_output_tokens=1)
    old, young = admit_running(scheduler, [1] * 6, 10), admit_running(scheduler, [2] * 3, 9)
    while len(old.tokens) < 10:
        take_turn(scheduler)
    old.num_drafts = young.num_drafts = 4
    turn = scheduler.next_turn()
    assert turn.preempted == ()
    assert [part.num_tokens for part in turn.slices] == [3, 2], "the slots that their pages have"


def test_a_sequence_in_a_pass_keeps_its_pages_until_the_pass_ends() -> None:
    scheduler = make_scheduler(num_pages=2)
    sequence = admit_running(scheduler, [1], max_tokens=7)
    scheduler.next_turn()
    scheduler.cancel(sequence)
    with pytest.raises(ResourceExhausted):
        scheduler.admit(make_request([1], max_tokens=1))
    assert scheduler.complete_turn([(1,)]) == [None]
    scheduler.admit(make_request([1], max_tokens=7))
