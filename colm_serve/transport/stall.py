"""A limit on how long a message is held back by a receiver that takes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from colm_serve.errors import DeadlineExceeded

logger = logging.getLogger(__name__)


async def in_time(sending: Awaitable[None], stall_timeout_s: float) -> None:
    """Send something that flow control may hold back.

    Raises:
        DeadlineExceeded: the receiver took nothing for so long.
    """
    try:
        async with asyncio.timeout(stall_timeout_s):
            await sending
    except TimeoutError as error:
        raise stalled(stall_timeout_s) from error


def stalled(stall_timeout_s: float) -> DeadlineExceeded:
    """What ends a call whose receiver takes nothing; said here too, as it may never hear of it."""
    error = DeadlineExceeded(f"the receiver took nothing for stall_timeout_s: {stall_timeout_s}")
    logger.warning("a call is ended: %s", error)
    return error
