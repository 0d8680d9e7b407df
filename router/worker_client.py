"""The router's calls to workers, with the errors of our own tree."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

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
from colm_serve.errors import ColmError, DataLoss, InvalidArgument, Unavailable, WorkerFailed
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from colm_serve.transport import serde
from colm_serve.transport.channel import connect
from colm_serve.transport.status import from_rpc_error

_Call = grpc.aio.UnaryStreamCall[decode_pb2.DecodeStart, decode_pb2.DecodeEvent]

#: A worker that takes longer to move a request is as good as gone; its stream tells.
MOVE_TIMEOUT_S = 2.0


class WorkerClients:
    """One channel to each worker process, so that a restarted one gets a fresh channel."""

    def __init__(self, tls: TlsConfig | None) -> None:
        self._tls = tls
        self._connections: dict[Member, _Connection] = {}

    async def status(self, member: Member, timeout_s: float) -> DecodeStatus | PrefillStatus:
        """Ask a worker how it is.

        Raises:
            ColmError: it did not answer, or not in time.
        """
        connection = self._connection(member)
        try:
            if member.kind is WorkerKind.DECODE:
                request = decode_pb2.DecodeStatusRequest()
                return serde.decode_status_from_proto(
                    await connection.decode.GetStatus(request, timeout=timeout_s)
                )
            prefill: Any = prefill_pb2_grpc.PrefillServiceStub(connection.channel)
            return serde.prefill_status_from_proto(
                await prefill.GetStatus(prefill_pb2.PrefillStatusRequest(), timeout=timeout_s)
            )
        except grpc.aio.AioRpcError as error:
            raise _why_failed(error, member) from error

    def decode(self, member: Member, request: DecodeRequest, timeout_s: float) -> DecodeCall:
        """Open a Decode stream."""
        stub = self._connection(member).decode
        call = stub.Decode(serde.decode_start_to_proto(request), timeout=timeout_s)
        return DecodeCall(call, stub, member, request.request_id)

    async def close(self, member: Member) -> None:
        """Close a worker's channel; calls under way there fail with Unavailable."""
        connection = self._connections.pop(member, None)
        if connection is not None:
            await connection.channel.close()

    async def close_all(self) -> None:
        for member in tuple(self._connections):
            await self.close(member)

    def _connection(self, member: Member) -> _Connection:
        connection = self._connections.get(member)
        if connection is None:
            channel = connect(member.address, self._tls)
            connection = _Connection(channel, decode_pb2_grpc.DecodeServiceStub(channel))
            self._connections[member] = connection
        return connection


class _Connection(NamedTuple):
    """A channel, and what calls a decode worker through it: a stub takes long to make."""

    channel: grpc.aio.Channel
    decode: Any


class DecodeCall:
    """One Decode stream. `cancel` it when done with it: that frees its pages."""

    def __init__(self, call: _Call, stub: Any, member: Member, request_id: str) -> None:
        self._call = call
        self._stub = stub
        self._member = member
        self._request_id = request_id

    async def events(self) -> AsyncGenerator[DecodeEvent, None]:
        """The request's events until the worker ends the stream.

        Raises:
            ColmError: what the worker or the connection failed with.
        """
        first = await self._read()
        if first is None:
            return
        # The first token may come while its client hears of the admission.
        reading = asyncio.create_task(self._read())
        reading.add_done_callback(_note_failure)
        try:
            yield self._event(first)
            message = await reading
            while message is not None:
                yield self._event(message)
                message = await self._read()
        finally:
            reading.cancel()

    async def move_level(self, level: int) -> None:
        """Have the request's tokens made at another level.

        Raises:
            UnknownRequest: it has ended there.
            ColmError: the worker or the connection failed, or took too long.
        """
        move = serde.move_level_to_proto(MoveLevel(self._request_id, level))
        try:
            await self._stub.MoveLevel(move, timeout=MOVE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _why_failed(error, self._member) from error
        except asyncio.CancelledError as error:
            raise _why_cancelled(error, self._member) from error

    def cancel(self) -> None:
        self._call.cancel()

    def _event(self, message: decode_pb2.DecodeEvent) -> DecodeEvent:
        try:
            return serde.decode_event_from_proto(message)
        except (InvalidArgument, KeyError) as error:
            raise DataLoss(f"{self._member.worker_id}: unreadable event: {error}") from error

    async def _read(self) -> decode_pb2.DecodeEvent | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _why_failed(error, self._member) from error
        except asyncio.CancelledError as error:
            raise _why_cancelled(error, self._member) from error
        return message if isinstance(message, decode_pb2.DecodeEvent) else None


def _note_failure(reading: asyncio.Task[decode_pb2.DecodeEvent | None]) -> None:
    """Nobody may be left to hear of it, which asyncio would complain of."""
    if not reading.cancelled():
        reading.exception()


def _why_failed(error: grpc.aio.AioRpcError, member: Member) -> ColmError:
    """INTERNAL, UNKNOWN and the like say nothing of the request: the worker has failed."""
    ours = from_rpc_error(error)
    if type(ours) is ColmError:
        return WorkerFailed(f"{member.worker_id}: {error.code().name}: {ours}")
    return ours


def _why_cancelled(error: asyncio.CancelledError, member: Member) -> BaseException:
    """gRPC raises CancelledError also when the channel was closed under the call."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return error
    lost: ColmError = Unavailable(f"the connection to {member.worker_id} was closed")
    return lost
