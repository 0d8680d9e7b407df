"""A service in a thread of its own: it starts, stops, and a failed start leaves nothing."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from colm_serve.errors import InvalidConfig
from colm_serve.transport.host import ServiceThread


class Recorder:
    """A service that notes what is called, on which thread."""

    def __init__(self, problem: Exception | None = None, *, hangs: bool = False) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self._problem = problem
        self._hangs = hangs

    async def start(self) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append("start")
        if self._hangs:
            await asyncio.Event().wait()
        if self._problem is not None:
            raise self._problem

    async def stop(self, grace_s: float) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(f"stop {grace_s}")


def service_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "service"}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = service_threads()
    yield
    assert service_threads() <= before


def test_a_service_runs_on_its_own_thread_until_it_is_stopped() -> None:
    recorder = Recorder()
    host = ServiceThread(recorder)
    assert recorder.calls == ["start"]
    host.stop(grace_s=0.5)
    assert recorder.calls == ["start", "stop 0.5"]
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_stopping_twice_is_safe() -> None:
    recorder = Recorder()
    host = ServiceThread(recorder)
    host.stop()
    host.stop()
    assert recorder.calls == ["start", "stop 2.0"]


def test_a_failed_start_surfaces_and_ends_the_thread() -> None:
    with pytest.raises(InvalidConfig, match="host"):
        ServiceThread(Recorder(InvalidConfig("host", "x", "y")))


def test_a_start_that_hangs_is_bounded_and_ends_the_thread() -> None:
    with pytest.raises(TimeoutError):
        ServiceThread(Recorder(hangs=True), start_timeout_s=0.1)


def test_a_loop_that_stands_still_is_told_by_its_health() -> None:
    may_go_on = threading.Event()
    host = ServiceThread(Recorder())
    try:
        host._loop.call_soon_threadsafe(may_go_on.wait, 60)
        wait_until(lambda: host.health().loop_stalled_s > 0.1)
        stalled = host.health(turn_s=3.0)
        assert (stalled.pid, stalled.turn_s) == (os.getpid(), 3.0)
        assert host.health().loop_cpu_s == stalled.loop_cpu_s, "waiting is no work"
        may_go_on.set()
        wait_until(lambda: host.health().loop_stalled_s == 0)
        assert host.health().loop_cpu_s > stalled.loop_cpu_s
    finally:
        may_go_on.set()
        host.stop()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


class Iterating(Recorder):
    """A service that leaves a call behind which waits inside a generator."""

    async def start(self) -> None:
        await super().start()
        self._call = asyncio.create_task(self._serve())
        await asyncio.sleep(0)

    async def _serve(self) -> None:
        async for _ in self._items():
            self.calls.append("item")

    async def _items(self) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.calls.append("closed")


def test_a_call_that_is_left_behind_is_ended_before_its_generator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Iterating()
    ServiceThread(recorder).stop()
    assert recorder.calls == ["start", "item", "stop 2.0", "closed"]
    assert caplog.records == []
