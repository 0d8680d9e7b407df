"""Some boxes of one kind, for callers on an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from colm_serve.box import Box, BoxFailed
from colm_serve.errors import ResourceExhausted, Unavailable


class BoxPool:
    """Gives each call to a box that has none; calls wait in the order in which they came.

    Args:
        max_calls: that may be under way, those that wait among them.
        max_wait_s: how long a caller waits, whatever its own call may take.
    """

    def __init__(self, boxes: Sequence[Box], *, max_calls: int, max_wait_s: float) -> None:
        self._boxes = tuple(boxes)
        self._idle: queue.SimpleQueue[Box] = queue.SimpleQueue()
        for box in self._boxes:
            self._idle.put(box)
        self._threads = ThreadPoolExecutor(len(self._boxes), thread_name_prefix="box")
        self._max_calls = max_calls
        self._max_wait_s = max_wait_s
        self._lock = threading.Lock()
        self._num_calls = 0
        self._is_closed = False

    async def call(self, data: bytes, *, cpu_s: float, timeout_s: float) -> bytes:
        """As `Box.call`, where a box can be started.

        Raises:
            BoxFailed: the call's own work did not come to an end.
            ResourceExhausted: too many calls wait, or this one has waited for too long.
            Unavailable: no box starts, or the pool is closed.
        """
        with self._lock:
            if self._num_calls >= self._max_calls:
                raise ResourceExhausted(
                    f"{self._num_calls} large requests are being read, the most there may be; "
                    "try again later"
                )
            self._num_calls += 1
        future = self._threads.submit(self._run, data, cpu_s, timeout_s)
        future.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(self._max_wait_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise ResourceExhausted(
                f"a large request was not read within {self._max_wait_s:g} s, beside others; "
                "try again later"
            ) from error

    def start(self) -> None:
        """Have every box ready before the first call needs it; from any thread, raises nothing."""
        for box in self._boxes:
            self._threads.submit(_start, box)

    def close(self) -> None:
        """Kill the boxes; calls under way end with BoxFailed. Blocks for a moment."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for box in self._boxes:
            box.close()

    def _run(self, data: bytes, cpu_s: float, timeout_s: float) -> bytes:
        # There are as many boxes as threads.
        box = self._idle.get()
        try:
            _start(box)
            return box.call(data, cpu_s=cpu_s, timeout_s=timeout_s)
        except BoxFailed as error:
            if self._is_closed:
                raise Unavailable("the router is closing") from error
            raise
        finally:
            self._idle.put(box)

    def _ended(self, future: Future[bytes]) -> None:
        """Also a call that was cancelled before a box had it."""
        with self._lock:
            self._num_calls -= 1


def _start(box: Box) -> None:
    if box.pid is None:
        try:
            box.start()
        except BoxFailed as error:
            raise Unavailable(f"no process to work in: {error}") from error
