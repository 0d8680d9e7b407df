"""A decode worker on a virtual clock, one step after another, by the real scheduler."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from colm_serve.config import DecodeConfig
from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.decode_worker.scheduler import DecodeScheduler
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.decode_worker.turn import Chunk, Row, Turn
from colm_serve.errors import ResourceExhausted
from colm_serve.kv.ledger import PageLedger
from tests.simulate.clusters import COSTS


@dataclass(frozen=True)
class Job:
    """A request, and when it is moved to another level or given up, if it is."""

    arrival_s: float
    num_prompt: int
    max_tokens: int
    level: int
    move: tuple[float, int] | None = None
    cancel_s: float | None = None


@dataclass
class Course:
    """When its first and last token came, if they did, and how often it lost its pages."""

    first_s: float | None = None
    end_s: float | None = None
    is_refused: bool = False
    num_preemptions: int = 0


def run_stepwise(jobs: Seq[Job], config: DecodeConfig) -> list[Course]:
    """Serve requests whose prompts are all computed by the worker itself."""
    return _Stepwise(jobs, config).run()


class _Stepwise:
    def __init__(self, jobs: Seq[Job], config: DecodeConfig) -> None:
        self._jobs = jobs
        self._courses = [Course() for _ in jobs]
        self._sequences: dict[int, Sequence] = {}
        self._numbers: dict[Sequence, int] = {}
        self._scheduler = DecodeScheduler(
            PageLedger(config.num_pages),
            page_size=config.page_size,
            max_rows=config.max_rows,
            max_waiting=config.max_waiting,
            max_batch_tokens=config.max_batch_tokens,
            expected_output_tokens=config.expected_output_tokens,
            eos_token_ids=(),
            cache_root=b"weights",
        )
        events = [(job.arrival_s, "arrive", number) for number, job in enumerate(jobs)]
        events += [(job.move[0], "move", n) for n, job in enumerate(jobs) if job.move]
        events += [(job.cancel_s, "cancel", n) for n, job in enumerate(jobs) if job.cancel_s]
        self._events = sorted(events, reverse=True)

    def run(self) -> list[Course]:
        now = 0.0
        readmitted: list[Sequence] = []
        while True:
            turn = self._scheduler.next_turn()
            readmitted += turn.readmitted
            # They come back one after another, and the first has an idle worker begin.
            while readmitted:
                self._scheduler.start(readmitted.pop(0))
                if not turn.slices:
                    break
            if turn.slices:
                end = now + _seconds(turn)
                self._play_until(end)
                now = end
                self._complete(turn, now)
            elif not (readmitted or turn.preempted or self._scheduler.has_work):
                if not self._events:
                    return self._courses
                now = max(now, self._events[-1][0])
                self._play_until(now)

    def _play_until(self, now: float) -> None:
        while self._events and self._events[-1][0] <= now:
            _, what, number = self._events.pop()
            job, sequence = self._jobs[number], self._sequences.get(number)
            if what == "arrive":
                self._arrive(number, job)
            elif sequence is not None and what == "cancel":
                self._scheduler.cancel(sequence)
            elif sequence is not None and job.move is not None:
                sequence.level = job.move[1]

    def _arrive(self, number: int, job: Job) -> None:
        sampling = SamplingParams(job.max_tokens, temperature=0, ignore_eos=True)
        prompt = (number,) * job.num_prompt
        request = DecodeRequest(str(number), prompt, job.level, sampling, (), "weights")
        try:
            sequence = self._scheduler.admit(request)
        except ResourceExhausted:
            self._courses[number].is_refused = True
            return
        self._sequences[number] = sequence
        self._numbers[sequence] = number
        self._scheduler.start(sequence)

    def _complete(self, turn: Turn, now: float) -> None:
        made = [(1,) if isinstance(part, Row) else () for part in turn.slices]
        outcomes = self._scheduler.complete_turn(made)
        for part, outcome in zip(turn.slices, outcomes, strict=True):
            course = self._courses[self._numbers[part.sequence]]
            course.num_preemptions = part.sequence.num_preemptions
            if outcome is not None and outcome.tokens:
                course.first_s = course.first_s or now
                course.end_s = now if outcome.reason else None


def _seconds(turn: Turn) -> float:
    num_levels, cost = COSTS.num_levels, COSTS.step.step_cost
    rows, cached = [0] * num_levels, [0] * num_levels
    for part in turn.slices:
        if isinstance(part, Row):
            for chain in range(part.level):
                rows[chain] += 1
                cached[chain] += len(part.sequence.tokens)
    num_chunk = sum(part.num_tokens for part in turn.slices if isinstance(part, Chunk))
    weights_s = 0.0 if any(rows) else cost.chain_s[0]
    return (
        cost.step_s(rows, cached)
        + num_chunk * COSTS.prefill.token_s
        + (weights_s if num_chunk else 0.0)
    )
