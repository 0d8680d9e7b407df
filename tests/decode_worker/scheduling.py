"""What tests of the decode scheduler share: short ways to make one and to run it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.decode_worker.scheduler import DecodeScheduler
from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.decode_worker.turn import Chunk, Outcome, Row, Turn
from colm_serve.kv.ledger import PageLedger

PAGE_SIZE = 4
EOS = 9


def make_request(
    prompt: Seq[int],
    max_tokens: int = 4,
    level: int = 1,
    *,
    ignore_eos: bool = False,
    cache_salt: str = "",
) -> DecodeRequest:
    sampling = SamplingParams(max_tokens, temperature=0, ignore_eos=ignore_eos)
    return DecodeRequest("r", tuple(prompt), level, sampling, (), "weights", cache_salt=cache_salt)


def make_scheduler(
    num_pages: int = 64,
    max_rows: int = 4,
    max_waiting: int = 8,
    max_batch_tokens: int = 10,
    expected_output_tokens: int = 100,
) -> DecodeScheduler:
    return DecodeScheduler(
        PageLedger(num_pages),
        page_size=PAGE_SIZE,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_batch_tokens=max_batch_tokens,
        expected_output_tokens=expected_output_tokens,
        eos_token_ids=(EOS,),
        cache_root=b"weights",
    )


def ship_and_start(scheduler: DecodeScheduler, sequence: Sequence) -> Sequence:
    """Its KV comes from elsewhere."""
    sequence.num_computed = sequence.num_prefill
    scheduler.start(sequence)
    return sequence


def admit_running(
    scheduler: DecodeScheduler, prompt: Seq[int], max_tokens: int = 4, level: int = 1
) -> Sequence:
    request = make_request(prompt, max_tokens, level)
    return ship_and_start(scheduler, scheduler.admit(request))


def take_turn(scheduler: DecodeScheduler, token: int = 1) -> tuple[Turn, list[Outcome | None]]:
    """One pass in which every row makes `token`, and its drafts' as well."""
    turn = scheduler.next_turn()
    made = [(token,) * part.num_tokens if isinstance(part, Row) else () for part in turn.slices]
    return turn, scheduler.complete_turn(made)


def run_to_end(scheduler: DecodeScheduler, sequence: Sequence, token: int = 1) -> None:
    while sequence.stage is not Stage.FINISHED:
        assert scheduler.has_work
        for readmitted in take_turn(scheduler, token)[0].readmitted:
            scheduler.start(readmitted)


def run_to_preemption(scheduler: DecodeScheduler) -> Turn:
    while scheduler.has_work:
        turn, _ = take_turn(scheduler)
        if turn.preempted:
            return turn
    raise AssertionError("nobody was preempted")


def rows_of(turn: Turn) -> list[Sequence]:
    return [part.sequence for part in turn.slices if isinstance(part, Row)]


def chunks_of(turn: Turn) -> list[tuple[Sequence, int]]:
    return [(p.sequence, p.num_tokens) for p in turn.slices if isinstance(p, Chunk)]
