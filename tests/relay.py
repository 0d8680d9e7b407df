"""A server between a decode worker and a prefill worker that changes what the latter answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from colm_serve.transport.channel import bind, connect, make_server

METHOD = "/colm.v1.PrefillService/Prefill"

#: Makes what is sent out of what a real worker answered and what it answered to another call.
Tamper = Callable[[list[bytes], list[bytes]], Sequence[bytes]]


class Relay:
    """Passes Prefill calls on to a real worker and tampers with what that answers."""

    def __init__(
        self, address: str, tamper: Tamper, after: Callable[[Relay], Any], pause_s: float = 0.0
    ) -> None:
        """
        Args:
            pause_s: after each message, as on a slow link.
        """
        self._target = address
        self._tamper = tamper
        self._after = after
        self._pause_s = pause_s
        self._last: list[bytes] = []
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> str:
        self._server = make_server()
        handler: Any = grpc.unary_stream_rpc_method_handler(self._prefill)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("colm.v1.PrefillService", {"Prefill": handler}),)
        )
        address = bind(self._server, "127.0.0.1", 0, None)
        await self._server.start()
        return address

    def begin_stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._server.stop(None))

    async def stop(self) -> None:
        self.begin_stop()
        assert self._stopping is not None
        await self._stopping

    async def _prefill(self, request: bytes, context: Any) -> None:
        async with connect(self._target, None) as channel:
            prefill: Any = channel.unary_stream(METHOD)
            messages = [message async for message in prefill(request)]
        for message in self._tamper(messages, self._last or messages):
            await context.write(message)
            await asyncio.sleep(self._pause_s)
        self._last = messages
        await self._after(self)


async def end(relay: Relay) -> None:
    """The stream ends as if all were well."""


async def hang(relay: Relay) -> None:
    await asyncio.Event().wait()


async def vanish(relay: Relay) -> None:
    """Every connection breaks."""
    relay.begin_stop()
    await hang(relay)
