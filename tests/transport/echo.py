"""A gRPC server whose one method does what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from colm_serve.config import TlsConfig
from colm_serve.transport.channel import bind, make_server

Handler = Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]


@asynccontextmanager
async def serving(
    handler: Handler, tls: TlsConfig | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[str]:
    """The bound address of a server that answers `call` with `handler`."""
    server = make_server()
    methods: dict[str, Any] = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    address = bind(server, host, 0, tls)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def call(channel: grpc.aio.Channel, request: bytes = b"ping") -> bytes:
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Call")
    return await method(request, timeout=10)


async def echo(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return request
