"""A response to a request that is not read to its end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import Response
from starlette.types import Receive, Scope, Send

#: What a client may still send, and for how long, until it has seen the response.
_MAX_UNREAD_BYTES = 64 * 2**20
_MAX_UNREAD_S = 2.0


class ClosingResponse(Response):
    """Sends a response at once and closes the connection.

    What the client is still sending is thrown away for a moment first: a connection that is closed
    with bytes unread is reset, and the client would see that in place of the response.
    """

    def __init__(self, response: Response) -> None:
        headers = {**response.headers, "connection": "close"}
        super().__init__(response.body, response.status_code, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_MAX_UNREAD_S):
                await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    num_bytes = 0
    while num_bytes <= _MAX_UNREAD_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        num_bytes += len(message.get("body", b""))
