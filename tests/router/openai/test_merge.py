from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from colm_serve.router.openai.merge import merge


class Source:
    """Streams `num` numbers, each once it is let; knows whether it is open."""

    def __init__(self, num: int, error: Exception | None = None) -> None:
        self.is_open = False
        self._num = num
        self._error = error

    async def stream(self) -> AsyncGenerator[int, None]:
        self.is_open = True
        try:
            for value in range(self._num):
                await asyncio.sleep(0)
                yield value
            if self._error is not None:
                raise self._error
        finally:
            self.is_open = False


async def test_every_event_of_every_stream_in_its_order() -> None:
    sources = [Source(num) for num in (3, 0, 5, 1)]
    got: list[list[int]] = [[], [], [], []]
    async for index, value in merge([s.stream() for s in sources], num_concurrent=4):
        got[index].append(value)
    assert got == [[0, 1, 2], [], [0, 1, 2, 3, 4], [0]]


async def test_only_some_streams_are_open_at_a_time() -> None:
    sources = [Source(4) for _ in range(5)]
    most = 0
    async for _ in merge([s.stream() for s in sources], num_concurrent=2):
        most = max(most, sum(s.is_open for s in sources))
    assert most == 2


async def test_an_error_ends_all() -> None:
    sources = [Source(100), Source(2, ValueError("bad"))]
    with pytest.raises(ValueError, match="bad"):
        async for _ in merge([s.stream() for s in sources], num_concurrent=2):
            pass
    assert not any(source.is_open for source in sources)


async def test_closing_closes_the_streams() -> None:
    sources = [Source(100), Source(100), Source(100)]
    async with aclosing(merge([s.stream() for s in sources], num_concurrent=2)) as events:
        await anext(events)
        assert sources[0].is_open
    assert not any(source.is_open for source in sources)
