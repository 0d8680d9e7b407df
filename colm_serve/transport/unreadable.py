"""Requests that are no messages of their method's type: refused as the caller's mistake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from colm_serve.errors import InvalidArgument
from colm_serve.transport.status import abort

# The stubs' classes take parameters, grpc's own do not.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context = grpc.aio.ServicerContext[Any, Any]
_Read = Callable[[bytes], Any]


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """Answers them with INVALID_ARGUMENT, where gRPC of itself says UNKNOWN.

    Methods are coroutine functions that write their responses. Those that take streams of requests,
    such as reflection's, are left as they are: none is ours.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        known = self._handlers.get(method)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:  # There is no such method; any number of those may be asked for.
                return None
            known = self._handlers[method] = _refusing(handler)
        return known


def _refusing(handler: _Handler) -> _Handler:
    read = handler.request_deserializer
    if read is None or handler.request_streaming:
        return handler
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(
            _aborting(handler.unary_stream), _returning(read), handler.response_serializer
        )
    assert handler.unary_unary is not None, "no method takes a stream and answers once"
    return grpc.unary_unary_rpc_method_handler(
        _aborting(handler.unary_unary), _returning(read), handler.response_serializer
    )


def _returning(read: _Read) -> _Read:
    """What reading raises before a method is called, gRPC does not let anybody catch."""

    def read_or_return(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            return InvalidArgument("request", data, f"a message that parses ({error})")

    return read_or_return


def _aborting(method: Any) -> Any:
    async def answer(request: Any, context: _Context) -> Any:
        if isinstance(request, InvalidArgument):
            await abort(context, request)
        return await method(request, context)

    return answer
