"""Run an asyncio service in a thread of its own, so that any process can host it.

A Ray actor, a test and a benchmark all start a service the same way: `ServiceThread(service)`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Protocol

from colm_serve.core import Health

#: How often a loop that is not held up notes that it runs.
_BEAT_S = 0.5


class Service(Protocol):
    """Something that serves until it is stopped."""

    async def start(self) -> None:
        """Bind and begin to serve; raises when it cannot."""

    async def stop(self, grace_s: float) -> None:
        """Stop taking calls, give those under way `grace_s` seconds, release everything."""


class ServiceThread:
    """A service on an event loop in a daemon thread; started when the constructor returns."""

    def __init__(self, service: Service, start_timeout_s: float = 60.0) -> None:
        self._service = service
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._beaten_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self._thread.start()
        try:
            self._call(service.start()).result(start_timeout_s)
        except BaseException:
            self._end_loop()
            raise

    def health(self, turn_s: float = 0.0) -> Health:
        """How the loop is; from any other thread.

        Args:
            turn_s: what `Health` is to say of the engine.
        """
        late_s = time.monotonic() - self._beaten_at - _BEAT_S
        assert self._thread.ident is not None, "the thread has been started"
        clock = time.pthread_getcpuclockid(self._thread.ident)
        return Health(os.getpid(), max(0.0, late_s), time.clock_gettime(clock), turn_s)

    def stop(self, grace_s: float = 2.0) -> None:
        """Stop the service and its thread; safe to call twice."""
        if not self._thread.is_alive():
            return
        try:
            self._call(self._service.stop(grace_s)).result(grace_s + 10.0)
        finally:
            self._end_loop()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._beat)
        self._loop.run_forever()
        # Ends the tasks first: a server that is stopped cancels its calls but awaits none of them,
        # and a generator that is still being iterated cannot be closed.
        self._runner.close()

    def _beat(self) -> None:
        self._beaten_at = time.monotonic()
        self._loop.call_later(_BEAT_S, self._beat)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)


def settle_heap() -> None:
    """Free what is garbage, and keep the rest out of later garbage collections.

    For a process that has started: looking through all that torch and its like have made stops
    every thread for 0.1 s, again and again.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
