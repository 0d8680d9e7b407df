"""Boxes for callers on an event loop: bounded, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from colm_serve.box import Box, BoxFailed
from colm_serve.box_pool import BoxPool
from colm_serve.errors import ResourceExhausted, Unavailable

MIB = 2**20


@asynccontextmanager
async def pool(
    module: str, num_boxes: int = 2, max_calls: int = 4, max_wait_s: float = 60
) -> AsyncIterator[BoxPool]:
    boxes = [Box(f"tests.boxed.{module}", memory_bytes=256 * MIB) for _ in range(num_boxes)]
    made = BoxPool(boxes, max_calls=max_calls, max_wait_s=max_wait_s)
    try:
        yield made
    finally:
        await asyncio.to_thread(made.close)


async def call(boxes: BoxPool, data: bytes) -> bytes:
    return await boxes.call(data, cpu_s=60, timeout_s=60)


async def test_each_call_has_its_box() -> None:
    async with pool("trouble") as boxes:
        pids = set(await asyncio.gather(*(call(boxes, b"pid") for _ in range(4))))
        assert 1 <= len(pids) <= 2
        boxes.start()
        assert await call(boxes, b"pid") in pids or len(pids) == 1


async def test_calls_beyond_the_bound_are_refused_at_once() -> None:
    async with pool("trouble", num_boxes=1, max_calls=2) as boxes:
        calls = [asyncio.create_task(call(boxes, b"sleep")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="2 large requests are being read"):
            await call(boxes, b"pid")
        # One that waits gives its place back when its caller leaves.
        calls[1].cancel()
        await asyncio.wait(calls[1:])
        again = asyncio.create_task(call(boxes, b"sleep"))
        await asyncio.sleep(0)
        await asyncio.to_thread(boxes.close)
        ended = await asyncio.gather(calls[0], again, return_exceptions=True)
        assert all(isinstance(error, Unavailable | asyncio.CancelledError) for error in ended)


async def test_nobody_waits_for_ever() -> None:
    async with pool("trouble", num_boxes=1, max_wait_s=0.2) as boxes:
        with pytest.raises(ResourceExhausted, match=r"not read within 0\.2 s"):
            await call(boxes, b"sleep")


async def test_work_that_dies_is_told_from_boxes_that_do_not_start() -> None:
    async with pool("trouble", num_boxes=1) as boxes:
        with pytest.raises(BoxFailed, match="signal 9"):
            await call(boxes, b"die")
        assert await call(boxes, b"pid")
    async with pool("unable", num_boxes=1) as boxes:
        boxes.start()
        with pytest.raises(Unavailable, match="no process to work in"):
            await call(boxes, b"pid")
