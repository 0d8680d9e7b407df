"""What a supervisor does to an actor that answers late, not at all, or that it is dead."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import count, repeat
from typing import cast

from colm_serve.cluster.actors import Actors
from colm_serve.cluster.news import MAX_LINES, News
from colm_serve.cluster.placement import Role, Slot
from colm_serve.cluster.supervisors import Supervisors
from colm_serve.config import RayConfig
from colm_serve.core import Health
from colm_serve.errors import ColmError, DeadlineExceeded, Unavailable

SLOT = Slot(Role.DECODE, index=0, bundle=0, num_cpus=1, num_gpus=0, num_threads=1)
LATE = DeadlineExceeded("decode-0: no answer to health within 5 s")
ALIVE = Health(pid=7)


class PlainActors:
    """One actor, whose answers are given; it hangs after the last."""

    def __init__(self, answers: Iterator[Health | ColmError], cpu_s: Iterator[float]) -> None:
        self._answers = answers
        self._cpu_s = cpu_s
        self.has_answered = asyncio.Event()

    def __contains__(self, slot: Slot) -> bool:
        return True

    async def call(self, slot: Slot, method: str, timeout_s: float) -> Health:
        assert method == "health"
        answer = next(self._answers, None)
        if answer is None:
            self.has_answered.set()
            await asyncio.Event().wait()
        if isinstance(answer, ColmError):
            raise answer
        return cast(Health, answer)

    async def processor_s(self, slot: Slot, pid: int | None) -> float | None:
        return next(self._cpu_s)


async def run(
    *answers: Health | ColmError,
    cpu_s: Iterator[float],
    still_s: float = 1e-6,
    num_failed_fills: int = 0,
) -> tuple[list[str], tuple[str, ...]]:
    """What was done, and what was told, until the answers are used up."""
    done: list[str] = []
    news = News()
    actors = PlainActors(iter(answers), cpu_s)

    async def fill(slot: Slot) -> None:
        done.append("fill")
        if done.count("fill") <= num_failed_fills:
            raise Unavailable("no room")

    async def evict(slot: Slot) -> None:
        done.append("evict")

    async def catch_up(slot: Slot) -> None:
        done.append("catch up")

    config = RayConfig(health_interval_s=1e-3, still_s=still_s)
    watching = Supervisors(
        config, cast(Actors, actors), fill=fill, evict=evict, catch_up=catch_up, tell=news.tell
    )
    watching.watch(SLOT)
    await asyncio.wait_for(actors.has_answered.wait(), 10)
    await watching.leave_alone(SLOT)
    return done, news.after(0)[1]


async def test_a_busy_actor_is_left_and_told_what_it_missed() -> None:
    done, told = await run(ALIVE, LATE, LATE, LATE, ALIVE, ALIVE, cpu_s=map(float, count()))
    assert done == ["catch up"]
    assert told == ("decode-0 is busy: no answer in 5 s", "decode-0 answers again")


async def test_an_actor_that_stands_still_is_replaced() -> None:
    done, told = await run(ALIVE, LATE, LATE, ALIVE, cpu_s=repeat(3.0))
    assert done == ["evict", "fill"]
    assert told[0] == "decode-0 is busy: no answer in 5 s"
    assert re.fullmatch(
        "decode-0 is replaced: it has neither answered nor worked for .* s", told[1]
    )
    assert re.fullmatch("decode-0 serves again after .* s", told[2])


async def test_an_actor_that_says_it_is_dead_is_replaced_at_once() -> None:
    done, told = await run(Unavailable("its engine failed"), ALIVE, cpu_s=repeat(0.0))
    assert done == ["evict", "fill"]
    assert told[0] == "decode-0 is replaced: its engine failed"


async def test_an_actor_that_cannot_be_replaced_is_tried_again() -> None:
    done, told = await run(
        Unavailable("its engine failed"), ALIVE, cpu_s=repeat(0.0), num_failed_fills=2
    )
    assert done == ["evict", "fill", "evict", "fill", "evict", "fill"]
    assert told[1:3] == ("decode-0 did not start: no room",) * 2


def test_news_are_told_once() -> None:
    news = News()
    assert news.after(0) == (0, ())
    news.tell("a")
    news.tell("b")
    assert news.after(0) == (2, ("a", "b"))
    assert news.after(1) == (2, ("b",))
    assert news.after(2) == (2, ())
    for number in range(3 * MAX_LINES):
        news.tell(str(number))
    last, lines = news.after(2)
    assert (last, len(lines), lines[-1]) == (3 * MAX_LINES + 2, MAX_LINES, str(3 * MAX_LINES - 1))
