"""Errors to gRPC status and back: the only place that knows both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from colm_serve.errors import (
    CheckpointError,
    ColmError,
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    InvalidConfig,
    RequestTooLarge,
    ResourceExhausted,
    RowFailed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownRequest,
    WorkerFailed,
)

#: Trailing metadata that tells a client how long to wait before it tries again.
RETRY_AFTER_KEY = "colm-retry-after-ms"
#: Trailing metadata that names the request field an InvalidArgument is about: UTF-8, as callers
#: choose keys of their own, and other metadata takes ASCII only.
FIELD_KEY = "colm-field-bin"
#: Trailing metadata that names the error where others have its status too.
ERROR_KEY = "colm-error"
#: Status and metadata come in one block, of which peers take 8 KiB.
MAX_DETAILS_BYTES = 4_096

_CODES: tuple[tuple[type[ColmError], grpc.StatusCode], ...] = (
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (UnknownRequest, grpc.StatusCode.NOT_FOUND),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidConfig, grpc.StatusCode.FAILED_PRECONDITION),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION),
    (Incompatible, grpc.StatusCode.FAILED_PRECONDITION),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DataLoss, grpc.StatusCode.DATA_LOSS),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RowFailed, grpc.StatusCode.INTERNAL),
    (WorkerFailed, grpc.StatusCode.INTERNAL),
)
#: Errors that are told by name, as others have their status too.
_NAMED = (UnknownRequest, RequestTooLarge, RowFailed, WorkerFailed)


class RemoteInvalidArgument(InvalidArgument):
    """An InvalidArgument that a peer raised; the message is the peer's."""

    def __init__(self, field: str, message: str) -> None:
        ColmError.__init__(self, message)
        self.field = field
        self.allowed = ""


class RemoteUnknownModel(UnknownModel, RemoteInvalidArgument):
    """An UnknownModel that a peer raised; the message is the peer's."""


class RemoteUnknownRequest(UnknownRequest, RemoteInvalidArgument):
    """An UnknownRequest that a peer raised; the message is the peer's."""


class RemoteRequestTooLarge(RequestTooLarge, RemoteInvalidArgument):
    """A RequestTooLarge that a peer raised; the message is the peer's."""


def status_code(error: ColmError) -> grpc.StatusCode:
    """The gRPC status that stands for `error`."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ColmError) -> NoReturn:
    """End the call with `error`'s status; does not return."""
    metadata: list[tuple[str, str | bytes]] = []
    if isinstance(error, ResourceExhausted):
        metadata.append((RETRY_AFTER_KEY, str(math.ceil(error.retry_after_s * 1000))))
    if isinstance(error, InvalidArgument):
        metadata.append((FIELD_KEY, error.field.encode("utf-8", "backslashreplace")))
    metadata += [(ERROR_KEY, kind.__name__) for kind in _NAMED if isinstance(error, kind)]
    await context.abort(status_code(error), _details(error), tuple(metadata))
    raise AssertionError("abort raises")


def _details(error: ColmError) -> str:
    """The message as far as it fits: what is not ASCII travels as three characters a byte."""
    text = str(error).encode("utf-8", "backslashreplace")
    num_bytes = 0
    for position, byte in enumerate(text):
        num_bytes += 1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3
        if num_bytes > MAX_DETAILS_BYTES:
            return text[:position].decode("utf-8", "ignore") + "…"
    return text.decode("utf-8")


def from_rpc_error(error: grpc.RpcError) -> ColmError:
    """The error of our tree that a failed call, synchronous or not, stands for."""
    call = cast(grpc.Call, error)
    message = call.details() or "no details"
    trailing = dict(call.trailing_metadata() or ())
    name = trailing.get(ERROR_KEY)
    match call.code():
        case grpc.StatusCode.NOT_FOUND if name == UnknownRequest.__name__:
            return RemoteUnknownRequest(_field(trailing, "request_id"), message)
        case grpc.StatusCode.NOT_FOUND:
            return RemoteUnknownModel(_field(trailing, "model"), message)
        case grpc.StatusCode.INVALID_ARGUMENT if name == RequestTooLarge.__name__:
            return RemoteRequestTooLarge(_field(trailing, "request"), message)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return RemoteInvalidArgument(_field(trailing, "request"), message)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return Incompatible(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            retry_ms = int(trailing.get(RETRY_AFTER_KEY, "1000"))
            return ResourceExhausted(message, retry_ms / 1000)
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(message)
        case grpc.StatusCode.DATA_LOSS:
            return DataLoss(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return Unavailable(message)
        case grpc.StatusCode.INTERNAL if name == RowFailed.__name__:
            return RowFailed(message)
        case grpc.StatusCode.INTERNAL if name == WorkerFailed.__name__:
            return WorkerFailed(message)
        case _:
            return ColmError(message)


def _field(trailing: Mapping[str, str | bytes], otherwise: str) -> str:
    field = trailing.get(FIELD_KEY, otherwise)
    return field.decode("utf-8", "replace") if isinstance(field, bytes) else field
