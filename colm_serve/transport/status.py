"""Errors to gRPC status and back: the only place that knows both."""

from __future__ import annotations

import math
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
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

#: Trailing metadata that tells a client how long to wait before it tries again.
RETRY_AFTER_KEY = "colm-retry-after-ms"
#: Trailing metadata that names the request field an InvalidArgument is about.
FIELD_KEY = "colm-field"

_CODES: tuple[tuple[type[ColmError], grpc.StatusCode], ...] = (
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidConfig, grpc.StatusCode.FAILED_PRECONDITION),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION),
    (Incompatible, grpc.StatusCode.FAILED_PRECONDITION),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DataLoss, grpc.StatusCode.DATA_LOSS),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)


class RemoteInvalidArgument(InvalidArgument):
    """An InvalidArgument that a peer raised; the message is the peer's."""

    def __init__(self, field: str, message: str) -> None:
        ColmError.__init__(self, message)
        self.field = field
        self.allowed = ""


class RemoteUnknownModel(UnknownModel, RemoteInvalidArgument):
    """An UnknownModel that a peer raised; the message is the peer's."""


def status_code(error: ColmError) -> grpc.StatusCode:
    """The gRPC status that stands for `error`."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ColmError) -> NoReturn:
    """End the call with `error`'s status; does not return."""
    metadata: list[tuple[str, str]] = []
    if isinstance(error, ResourceExhausted):
        metadata.append((RETRY_AFTER_KEY, str(math.ceil(error.retry_after_s * 1000))))
    if isinstance(error, InvalidArgument):
        metadata.append((FIELD_KEY, error.field))
    await context.abort(status_code(error), str(error), tuple(metadata))
    raise AssertionError("abort raises")


def from_rpc_error(error: grpc.RpcError) -> ColmError:
    """The error of our tree that a failed call, synchronous or not, stands for."""
    call = cast(grpc.Call, error)
    message = call.details() or "no details"
    trailing = dict(call.trailing_metadata() or ())
    match call.code():
        case grpc.StatusCode.NOT_FOUND:
            return RemoteUnknownModel(str(trailing.get(FIELD_KEY, "model")), message)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return RemoteInvalidArgument(str(trailing.get(FIELD_KEY, "request")), message)
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
        case _:
            return ColmError(message)
