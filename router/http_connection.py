"""One HTTP connection of the router's: closed when the client takes nothing for too long."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)


class StallLimitedProtocol(H11Protocol):
    """Breaks the connection off while more waits to be sent than is buffered, and none is taken.

    Whoever writes then learns that the client is gone, and ends what the response was made of.
    """

    stall_timeout_s: float
    _stalling: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        num_left = self.transport.get_write_buffer_size()
        self._stalling = self.loop.call_later(self.stall_timeout_s, self._check, num_left)

    def _unwatch(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def _check(self, num_before: int) -> None:
        if self.transport.get_write_buffer_size() < num_before:
            self._watch()
            return
        logger.warning(
            "HTTP client %s took nothing for stall_timeout_s: %s: its connection is closed",
            self.client, self.stall_timeout_s,
        )  # fmt: skip
        # To close it would be to wait until all has been taken.
        self.transport.abort()


def stall_limited(timeout_s: float) -> type[StallLimitedProtocol]:
    """The protocol of a server that breaks connections off after `timeout_s`."""
    return type("Protocol", (StallLimitedProtocol,), {"stall_timeout_s": timeout_s})
