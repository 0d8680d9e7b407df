"""Bounds how many requests are under way at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from colm_serve.errors import ResourceExhausted


class Admission:
    """At most `max_concurrent` requests; the next is refused at once, never queued."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self.num_running = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place; raises ResourceExhausted when all are taken."""
        if self.num_running >= self._max_concurrent:
            raise ResourceExhausted(
                f"{self.num_running} requests are under way, the most this router takes; "
                "try again later"
            )
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
