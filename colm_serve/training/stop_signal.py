"""A request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignal:
    """Set by `request`, or by a signal while it is entered.

    A second signal of the same kind acts as it would have without this.
    """

    def __init__(self, signals: Sequence[signal.Signals] = ()) -> None:
        self.requested = False
        self._signals = signals
        self._previous: dict[int, Any] = {}

    @classmethod
    def on_signals(cls) -> StopSignal:
        """Listens to SIGTERM and SIGINT, where Python lets it: on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return cls()
        return cls((signal.SIGTERM, signal.SIGINT))

    def request(self) -> None:
        """Ask for a stop."""
        self.requested = True

    def __enter__(self) -> Self:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request()
        signal.signal(number, self._previous.pop(number))
