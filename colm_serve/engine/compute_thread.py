"""A worker's one compute thread: its lock, its idle wait, its end and its failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from colm_serve.errors import Unavailable

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0


class ComputeThread:
    """Takes one turn after another while there is work.

    The worker's state is touched under `lock` only, by this thread and by those that serve
    calls; a turn computes with the lock released. A turn that raises breaks the worker for good:
    its process has to be replaced.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        has_work: Callable[[], bool],
        take_turn: Callable[[], None],
        on_failure: Callable[[Unavailable], None],
    ) -> None:
        """`has_work` and `on_failure` are called with the lock held, `take_turn` without."""
        self._worker_id = worker_id
        self._has_work = has_work
        self._take_turn = take_turn
        self._on_failure = on_failure
        self._failure: Unavailable | None = None
        self._turn_began: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self.is_stopping = False

    @property
    def lock(self) -> threading.Condition:
        """Guards the worker's state; `notify` it, held, when there may be work."""
        return self._changed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the turn it is in."""
        with self._changed:
            self.is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)

    @property
    def turn_s(self) -> float:
        """For how long the present turn has been going on; 0 between two."""
        began = self._turn_began
        return 0.0 if began is None else time.monotonic() - began

    def check_alive(self) -> None:
        """Raise Unavailable when the thread has failed."""
        if self._failure is not None:
            raise self._failure

    def check_accepting(self) -> None:
        """Raise Unavailable when no new work will be taken."""
        self.check_alive()
        if self.is_stopping:
            raise Unavailable(f"{self._worker_id} is stopping")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn_began = time.monotonic()
                self._take_turn()
                self._turn_began = None
        except Exception as error:
            logger.exception("%s: the compute thread failed", self._worker_id)
            with self._changed:
                self._failure = Unavailable(f"{self._worker_id} failed: {error!r}")
                self._on_failure(self._failure)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.is_stopping or self._has_work())
            return not self.is_stopping
