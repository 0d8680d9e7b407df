"""Requests that cannot be parsed are their caller's mistake, of whichever kind the method is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from colm_serve.errors import InvalidArgument
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc
from colm_serve.transport.channel import bind, connect, make_server
from colm_serve.transport.health import add_health
from colm_serve.transport.status import from_rpc_error

SERVICE = "/colm.v1.DecodeService"
UNREADABLE = b"\xff\xff"


class Servicer(decode_pb2_grpc.DecodeServiceServicer):
    async def GetStatus(self, request: Any, context: Any) -> decode_pb2.DecodeStatus:
        assert isinstance(request, decode_pb2.DecodeStatusRequest)
        return decode_pb2.DecodeStatus(worker_id="w")


@asynccontextmanager
async def connected() -> AsyncIterator[grpc.aio.Channel]:
    server = make_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Servicer(), server)
    await add_health(server)
    address = bind(server, "127.0.0.1", 0, None)
    await server.start()
    async with connect(address, None) as channel:
        yield channel
    await server.stop(None)


def assert_refused(error: grpc.aio.AioRpcError, message_type: str) -> None:
    refusal = from_rpc_error(error)
    assert isinstance(refusal, InvalidArgument)
    assert refusal.field == "request"
    assert f"{UNREADABLE!r} is not allowed" in str(refusal)
    assert message_type in str(refusal)


async def test_a_method_that_answers_once() -> None:
    async with connected() as channel:
        get_status: Any = channel.unary_unary(f"{SERVICE}/GetStatus")
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await get_status(UNREADABLE, timeout=5)
            assert_refused(error.value, "colm.v1.DecodeStatusRequest")
        status = decode_pb2.DecodeStatus.FromString(await get_status(b"", timeout=5))
        assert status.worker_id == "w"


async def test_a_method_that_answers_in_a_stream() -> None:
    async with connected() as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        call = watch(UNREADABLE, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert_refused(error.value, "grpc.health.v1.HealthCheckRequest")
        assert await watch(b"", timeout=5).read()


async def test_a_method_that_there_is_not() -> None:
    async with connected() as channel:
        missing: Any = channel.unary_unary(f"{SERVICE}/Missing")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await missing(b"", timeout=5)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
