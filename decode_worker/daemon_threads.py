"""Threads for work that cannot be stopped, which the process does not wait for when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

_T = TypeVar("_T")


class DaemonThreads:
    """Runs what it is given in turn; the threads are started by the first of it."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._waiting: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """What becomes of the work; it can be cancelled until a thread takes it up."""
        with self._lock:
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._run, name=self._name, daemon=True)
                    for _ in range(self._num_threads)
                ]
                for thread in self._threads:
                    thread.start()
        future: Future[_T] = Future()
        self._waiting.put(lambda: _do(work, future))
        return future

    def close(self) -> None:
        """End the threads that are idle now, and the others when their work is done."""
        for _ in range(self._num_threads):
            self._waiting.put(None)

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()


def _do(work: Callable[[], _T], future: Future[_T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - whoever waits for it is told
        future.set_exception(error)
    else:
        future.set_result(result)
