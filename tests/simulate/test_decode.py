"""The simulated decode worker does what the real scheduler does, step for step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.config import DecodeConfig
from colm_serve.errors import ResourceExhausted
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.decode import VirtualDecodeWorker
from colm_serve.simulate.sequence import VirtualSequence
from tests.simulate.clusters import COSTS, lone_worker, make_sequence
from tests.simulate.stepwise import Course, Job, run_stepwise


def run_virtual(jobs: list[Job], config: DecodeConfig) -> tuple[list[Course], VirtualDecodeWorker]:
    clock = VirtualClock()
    worker = lone_worker(config, clock)
    courses = [Course() for _ in jobs]
    sequences: dict[int, VirtualSequence] = {}

    def arrive(number: int, job: Job) -> None:
        sequence = make_sequence(number, job.num_prompt, job.max_tokens, job.level)
        try:
            worker.admit(sequence)
        except ResourceExhausted:
            courses[number].is_refused = True
        else:
            sequences[number] = sequence

    def move(number: int, level: int) -> None:
        if number in sequences:
            worker.move_level(sequences[number], level)

    def cancel(number: int) -> None:
        if number in sequences:
            worker.cancel(sequences[number])

    for number, job in enumerate(jobs):
        clock.at(job.arrival_s, arrive, number, job)
        if job.move is not None:
            clock.at(job.move[0], move, number, job.move[1])
        if job.cancel_s is not None:
            clock.at(job.cancel_s, cancel, number)
    clock.run()
    for number, sequence in sequences.items():
        course = courses[number]
        course.end_s, course.num_preemptions = sequence.ended_at, sequence.num_preemptions
        course.first_s = sequence.first_token_at
    return courses, worker


times = st.floats(0.001, 0.5)
jobs = st.builds(
    Job,
    arrival_s=times,
    num_prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 40),
    level=st.integers(1, COSTS.num_levels),
    move=st.none() | st.tuples(times, st.integers(1, COSTS.num_levels)),
    cancel_s=st.none() | times,
)


def apart(number: int, job: Job) -> Job:
    """What happens at one time happens in an order that nobody can rely on."""
    move, cancel_s = job.move, job.cancel_s
    return replace(
        job,
        arrival_s=job.arrival_s + 1e-6 * number,
        move=None if move is None else (move[0] + 1.1e-6 * number + 3e-7, move[1]),
        cancel_s=None if cancel_s is None else cancel_s + 1.2e-6 * number + 6e-7,
    )


configs = st.builds(
    DecodeConfig,
    kv_tokens=st.integers(64, 240),
    page_size=st.just(4),
    max_rows=st.integers(1, 6),
    max_waiting=st.integers(1, 6),
    max_batch_tokens=st.integers(8, 20),
    expected_output_tokens=st.integers(1, 40),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(jobs, min_size=1, max_size=10), configs)
def test_steps_in_closed_form_are_the_schedulers_steps(
    jobs: list[Job], config: DecodeConfig
) -> None:
    jobs = [apart(number, job) for number, job in enumerate(jobs)]
    expected = run_stepwise(jobs, config)
    courses, worker = run_virtual(jobs, config)
    for job, course, real in zip(jobs, courses, expected, strict=True):
        assert course.is_refused == real.is_refused
        if job.cancel_s is None:
            assert course.num_preemptions == real.num_preemptions
            assert course.first_s == pytest.approx(real.first_s)
            assert course.end_s == pytest.approx(real.end_s)
    worker.check_integrity()


def test_rows_of_one_composition_take_one_event() -> None:
    """Else a million requests would take hours."""
    clock = VirtualClock()
    worker = lone_worker(DecodeConfig(kv_tokens=65536, expected_output_tokens=1000), clock)
    for number in range(8):
        worker.admit(make_sequence(number, 1, 1000, 2))
    num_events = 0
    while clock.step():
        num_events += 1
    assert worker.num_tokens_by_level == [0, 8000, 0]
    assert num_events < 50


def test_the_mean_level_follows_the_moves() -> None:
    clock = VirtualClock()
    worker = lone_worker(DecodeConfig(), clock)
    sequence = make_sequence(0, 1, 10, 3)
    worker.admit(sequence)
    # The step in which the fourth token is made is under way.
    clock.at(0.0285, worker.move_level, sequence, 1)
    clock.run()
    assert worker.num_tokens_by_level == [6, 0, 4]
    assert sequence.mean_level == pytest.approx(1.8)
