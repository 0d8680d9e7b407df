"""What a cluster does of its own accord, a line each, for whoever runs it."""

from __future__ import annotations

import logging
from collections import deque

logger = logging.getLogger(__name__)

#: Lines kept for those who have not asked for a while.
MAX_LINES = 1_000


class News:
    """Lines in the order in which they were told, numbered from 1."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._num_told = 0

    def tell(self, line: str) -> None:
        logger.warning("%s", line)
        self._lines.append(line)
        self._num_told += 1

    def after(self, number: int) -> tuple[int, tuple[str, ...]]:
        """The number of the last line, and those after `number` that are still kept."""
        num_new = max(0, self._num_told - number)
        return self._num_told, tuple(self._lines)[-num_new:] if num_new else ()
