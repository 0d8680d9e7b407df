"""Several event streams as one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Event = TypeVar("Event")


async def merge(
    streams: Sequence[AsyncGenerator[Event, None]], num_concurrent: int
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events as they come, each with the index of its stream; some streams at a time.

    The first error of any stream ends all. Each stream is asked for its next event only once the
    last was taken, so a slow reader slows them down. Closing the generator closes the streams.
    """
    if len(streams) == 1:
        # Without the tasks that several need, which take longer than what most events are made of.
        async with aclosing(streams[0]) as only:
            async for single in only:
                yield 0, single
        return
    waiting = deque(enumerate(streams))
    pending: dict[asyncio.Task[Event | None], int] = {}
    try:
        while pending or waiting:
            while waiting and len(pending) < num_concurrent:
                index, stream = waiting.popleft()
                pending[asyncio.create_task(_next(stream))] = index
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                event = task.result()
                if event is not None:
                    pending[asyncio.create_task(_next(streams[index]))] = index
                    yield index, event
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(stream, None)
