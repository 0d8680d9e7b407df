"""The router's calls to workers, with the errors of our own tree."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio

from colm_serve.config import TlsConfig
from colm_serve.core import (
    DecodeEvent,
    DecodeRequest,
    DecodeStatus,
    Member,
    MoveLevel,
    PrefillStatus,
    WorkerKind,
)
from colm_serve.errors import ColmError, DataLoss, InvalidArgument, Unavailable
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from colm_serve.transport import serde
from colm_serve.transport.channel import connect
from colm_serve.transport.status import from_rpc_error

_Call = grpc.aio.StreamStreamCall[decode_pb2.DecodeControl, decode_pb2.DecodeEvent]


class WorkerClients:
    """One channel to each worker process, so that a restarted one gets a fresh channel."""

    def __init__(self, tls: TlsConfig | None) -> None:
        self._tls = tls
        self._channels: dict[Member, grpc.aio.Channel] = {}

    async def status(self, member: Member, timeout_s: float) -> DecodeStatus | PrefillStatus:
        """Ask a worker how it is.

        Raises:
            ColmError: it did not answer, or not in time.
        """
        channel = self._channel(member)
        try:
            if member.kind is WorkerKind.DECODE:
                decode: Any = decode_pb2_grpc.DecodeServiceStub(channel)
                request = decode_pb2.DecodeStatusRequest()
                return serde.decode_status_from_proto(
                    await decode.GetStatus(request, timeout=timeout_s)
                )
            prefill: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
            return serde.prefill_status_from_proto(
                await prefill.GetStatus(prefill_pb2.PrefillStatusRequest(), timeout=timeout_s)
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def decode(self, member: Member, timeout_s: float) -> DecodeCall:
        """Open a Decode stream; it begins with `DecodeCall.start`."""
        stub: Any = decode_pb2_grpc.DecodeServiceStub(self._channel(member))
        return DecodeCall(stub.Decode(timeout=timeout_s), member)

    async def close(self, member: Member) -> None:
        """Close a worker's channel; calls under way there fail with Unavailable."""
        channel = self._channels.pop(member, None)
        if channel is not None:
            await channel.close()

    async def close_all(self) -> None:
        for member in tuple(self._channels):
            await self.close(member)

    def _channel(self, member: Member) -> grpc.aio.Channel:
        if member not in self._channels:
            self._channels[member] = connect(member.address, self._tls)
        return self._channels[member]


class DecodeCall:
    """One Decode stream. `cancel` it when done with it: that frees its pages."""

    def __init__(self, call: _Call, member: Member) -> None:
        self._call = call
        self._member = member
        self._writing = asyncio.Lock()

    async def events(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Start the request and yield its events until the worker ends the stream.

        Raises:
            ColmError: what the worker or the connection failed with.
        """
        await self._write(serde.decode_start_to_proto(request))
        while (message := await self._read()) is not None:
            try:
                yield serde.decode_event_from_proto(message)
            except (InvalidArgument, KeyError) as error:
                raise DataLoss(f"{self._member.worker_id}: unreadable event: {error}") from error

    async def move_level(self, level: int) -> None:
        """Ask for another level; without effect when the request has ended."""
        await self._write(serde.move_level_to_proto(MoveLevel(level)))

    def cancel(self) -> None:
        self._call.cancel()

    async def _read(self) -> decode_pb2.DecodeEvent | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError as error:
            raise _why_cancelled(error, self._member) from error
        return message if isinstance(message, decode_pb2.DecodeEvent) else None

    async def _write(self, message: decode_pb2.DecodeControl) -> None:
        async with self._writing:
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # The call has ended; reading tells why.
            except asyncio.CancelledError as error:
                raise _why_cancelled(error, self._member) from error


def _why_cancelled(error: asyncio.CancelledError, member: Member) -> BaseException:
    """gRPC raises CancelledError also when the channel was closed under the call."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return error
    lost: ColmError = Unavailable(f"the connection to {member.worker_id} was closed")
    return lost
