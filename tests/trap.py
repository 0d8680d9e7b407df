"""Something that happens at the n-th occurrence of something else, on whatever thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Trap:
    """Calls `spring` when the thing it watches happens for the `point`-th time."""

    point: int = 0
    spring: Callable[[], object] = print
    num_seen: int = 0

    def set(self, point: int, spring: Callable[[], object]) -> None:
        self.point, self.spring, self.num_seen = point, spring, 0

    def see(self) -> None:
        self.num_seen += 1
        if self.num_seen == self.point:
            self.spring()

    def watch(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        """See each call of a method, before it does anything."""
        method = getattr(owner, name)

        def see_and_call(*arguments: Any) -> Any:
            self.see()
            return method(*arguments)

        patch.setattr(owner, name, see_and_call)


@dataclass
class StuckAfter:
    """Lets so many calls through and holds the next for ever, in whichever process it is."""

    num_calls: int

    def __call__(self) -> None:
        if self.num_calls == 0:
            threading.Event().wait()
        self.num_calls -= 1
