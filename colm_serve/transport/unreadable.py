"""Requests that are too large, or no messages of their method's type: the caller's mistakes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from colm_serve.errors import ColmError, InvalidArgument, RequestTooLarge
from colm_serve.transport.status import abort

# The stubs' classes take parameters, grpc's own do not.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context = grpc.aio.ServicerContext[Any, Any]
_Read = Callable[[bytes], Any]
#: Looks at a method's request before it is parsed; raises the ColmError to answer it with.
Look = Callable[[str, bytes], Awaitable[None]]


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """Answers them with INVALID_ARGUMENT, where gRPC of itself says UNKNOWN or RESOURCE_EXHAUSTED.

    Methods are coroutine functions that write their responses. Those that take streams of requests,
    such as reflection's, are left as they are: none is ours.
    """

    def __init__(self, max_request_bytes: int, look: Look | None = None) -> None:
        self._max_bytes = max_request_bytes
        self._look = look
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
            known = self._handlers[method] = self._refusing(method, handler)
        return known

    def _refusing(self, method: str, handler: _Handler) -> _Handler:
        read = handler.request_deserializer
        if read is None or handler.request_streaming:
            return handler
        # What reading raises before a method is called, gRPC does not let anybody catch, and it
        # waits for nothing: so the bytes come as they are.
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._answering(method, handler.unary_stream, read),
                response_serializer=handler.response_serializer,
            )
        assert handler.unary_unary is not None, "no method takes a stream and answers once"
        return grpc.unary_unary_rpc_method_handler(
            self._answering(method, handler.unary_unary, read),
            response_serializer=handler.response_serializer,
        )

    def _answering(self, name: str, method: Any, read: _Read) -> Any:
        async def answer(data: bytes, context: _Context) -> Any:
            try:
                self._check_size(data)
                if self._look is not None:
                    await self._look(name, data)
                request = _parse(read, data)
            except ColmError as error:
                await abort(context, error)
            return await method(request, context)

        return answer

    def _check_size(self, data: bytes) -> None:
        if len(data) > self._max_bytes:
            raise RequestTooLarge("request", f"{len(data)} bytes", f"at most {self._max_bytes}")


def _parse(read: _Read, data: bytes) -> Any:
    try:
        return read(data)
    except DecodeError as error:
        allowed = f"a message that parses ({error})"
        raise InvalidArgument("request", data, allowed) from error
