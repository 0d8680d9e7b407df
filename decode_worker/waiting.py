"""Waits that end with what they wait for, however often they are cancelled meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any


async def wait_out(*futures: asyncio.Future[Any]) -> None:
    """Return once all are done; what came of them they say themselves.

    Raises:
        asyncio.CancelledError: it was cancelled, once or more often; they are done all the same.
    """
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:
            cancelled = error
    for future in futures:
        if not future.cancelled():
            future.exception()  # Nobody may be left to ask for it.
    if cancelled is not None:
        raise cancelled


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once they are over."""
    for task in tasks:
        task.cancel()
    await wait_out(*tasks)
