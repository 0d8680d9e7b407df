"""Further connections of a stream: where one is too narrow, its layers are shared among several.

A lane has no state of its own but a few frames on their way: the call that computes the prompt
makes them all, and when it ends, all its lanes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from colm_serve.errors import InvalidArgument, Unavailable

MAX_LANES = 16
#: Frames of a lane that wait to be sent: one while another is being written.
MAX_WAITING = 2


class Lane:
    """Frames on their way from the call that makes them to the call that sends them."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_WAITING)
        self._is_taken = False
        self._is_whole = False

    async def put(self, frame: bytes | None) -> None:
        """Hand a frame over, or None after the last one; waits while there are enough."""
        await self._waiting.put(frame)
        self._is_whole = frame is None

    async def frames(self) -> AsyncGenerator[bytes]:
        """What is put, once."""
        if self._is_taken:
            raise InvalidArgument("lane", "one that is being sent", "one that is not")
        self._is_taken = True
        while (frame := await self._waiting.get()) is not None:
            yield frame

    def close(self) -> None:
        """Nothing more comes; a lane without its last frame ends where it is."""
        if not self._is_whole:
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._waiting.put_nowait(None)


class LaneTable:
    """The lanes of the streams under way, by stream id, which is as good as a password."""

    def __init__(self) -> None:
        self._lanes: dict[int, list[Lane]] = {}

    @contextmanager
    def open(self, stream_id: int, num_lanes: int) -> Iterator[list[Lane]]:
        """The lanes of a stream beyond its first, for as long as its call lasts.

        Raises:
            InvalidArgument: too many, or another stream has this id.
        """
        if num_lanes > MAX_LANES:
            raise InvalidArgument("num_lanes", num_lanes, f"1 to {MAX_LANES}")
        if num_lanes > 1 and stream_id in self._lanes:
            raise InvalidArgument("stream_id", stream_id, "one that no other stream has")
        lanes = [Lane() for _ in range(1, num_lanes)]
        if lanes:
            self._lanes[stream_id] = lanes
        try:
            yield lanes
        finally:
            if lanes:
                del self._lanes[stream_id]
            for lane in lanes:
                lane.close()

    def get(self, stream_id: int, lane: int) -> Lane:
        """Lane 1 or higher of a stream.

        Raises:
            Unavailable: there is no such stream, or not any more.
            InvalidArgument: it has no such lane.
        """
        lanes = self._lanes.get(stream_id)
        if lanes is None:
            raise Unavailable("the stream of this lane has ended")
        if not 1 <= lane <= len(lanes):
            raise InvalidArgument("lane", lane, f"1 to {len(lanes)}")
        return lanes[lane - 1]
