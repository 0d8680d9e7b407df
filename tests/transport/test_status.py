"""Errors cross a real connection as statuses and come back as errors."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from colm_serve.errors import (
    CheckpointError,
    ColmError,
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    InvalidConfig,
    RateLimited,
    RequestTooLarge,
    ResourceExhausted,
    RowFailed,
    TargetsMissed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownRequest,
    WorkerFailed,
    WriteFailed,
)
from colm_serve.transport.channel import connect
from colm_serve.transport.status import RETRY_AFTER_KEY, abort, from_rpc_error
from tests.transport.echo import call, serving

CASES: list[tuple[ColmError, grpc.StatusCode, type[ColmError]]] = [
    (
        InvalidArgument("top_p", 2, "at most 1 …"),
        grpc.StatusCode.INVALID_ARGUMENT,
        InvalidArgument,
    ),
    (UnknownModel("model", "x", "y"), grpc.StatusCode.NOT_FOUND, UnknownModel),
    (UnknownRequest("request_id", "x", "y"), grpc.StatusCode.NOT_FOUND, UnknownRequest),
    (RequestTooLarge("prompt", "x", "y"), grpc.StatusCode.INVALID_ARGUMENT, RequestTooLarge),
    (RowFailed("not a number"), grpc.StatusCode.INTERNAL, RowFailed),
    (WorkerFailed("out of luck"), grpc.StatusCode.INTERNAL, WorkerFailed),
    (InvalidConfig("tls", None, "y"), grpc.StatusCode.FAILED_PRECONDITION, Incompatible),
    (CheckpointError("no file"), grpc.StatusCode.FAILED_PRECONDITION, Incompatible),
    (WriteFailed("full disk"), grpc.StatusCode.INTERNAL, ColmError),
    (Incompatible("other weights"), grpc.StatusCode.FAILED_PRECONDITION, Incompatible),
    (Unauthenticated("no key"), grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
    (ResourceExhausted("full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
    (RateLimited("used up", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
    (TargetsMissed("slow", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
    (Unavailable("draining"), grpc.StatusCode.UNAVAILABLE, Unavailable),
    (DataLoss("damaged"), grpc.StatusCode.DATA_LOSS, DataLoss),
    (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    (ColmError("anything else"), grpc.StatusCode.INTERNAL, ColmError),
]


async def fail_with(error: ColmError) -> grpc.aio.AioRpcError:
    async def handler(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        await abort(context, error)

    async with serving(handler) as address, connect(address, None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
        return caught.value


@pytest.mark.parametrize(
    ("error", "code", "kind"), CASES, ids=[type(error).__name__ for error, _, _ in CASES]
)
async def test_there_and_back(error: ColmError, code: grpc.StatusCode, kind: type) -> None:
    failed = await fail_with(error)
    assert failed.code() is code
    back = from_rpc_error(failed)
    assert isinstance(back, kind)
    assert str(back) == str(error)


def test_every_error_has_a_case() -> None:
    def tree(kind: type[ColmError]) -> set[type[ColmError]]:
        ours = {c for c in kind.__subclasses__() if c.__module__ == "colm_serve.errors"}
        return {kind}.union(*(tree(child) for child in ours))

    assert tree(ColmError) == {type(error) for error, _, _ in CASES}


async def test_the_field_of_an_invalid_argument_comes_back() -> None:
    back = from_rpc_error(await fail_with(InvalidArgument("sampling.top_p", 2, "at most 1")))
    assert isinstance(back, InvalidArgument)
    assert back.field == "sampling.top_p"


@pytest.mark.parametrize(
    "key",
    ["schlüssel", "鍵", "🙂", "\0\n%", "\ud800", "x" * 9_000, "é" * 9_000],
    ids=["latin", "han", "emoji", "control", "surrogate", "long", "long_latin"],
)
async def test_callers_texts_in_an_error_change_nothing_of_its_kind(key: str) -> None:
    failed = await fail_with(InvalidArgument(f"schema.{key}", key, f"less of {key}"))
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT, failed.details()
    back = from_rpc_error(failed)
    assert isinstance(back, InvalidArgument)
    assert back.field == InvalidArgument(f"schema.{key}", key, "").field
    assert back.field.startswith("schema.")
    assert "is not allowed; allowed: less of" in str(back) or len(key) == 9_000


async def test_the_retry_time_comes_back() -> None:
    failed = await fail_with(ResourceExhausted("full", 2.5))
    assert dict(failed.trailing_metadata())[RETRY_AFTER_KEY] == "2500"
    back = from_rpc_error(failed)
    assert isinstance(back, ResourceExhausted)
    assert back.retry_after_s == 2.5


async def test_nobody_listening_is_unavailable() -> None:
    async with serving(_never) as address:
        pass
    async with connect(address, None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
    assert isinstance(from_rpc_error(caught.value), Unavailable)


async def test_an_error_that_is_not_ours_is_the_base_error() -> None:
    async def handler(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        raise ZeroDivisionError

    async with serving(handler) as address, connect(address, None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
    assert type(from_rpc_error(caught.value)) is ColmError


async def _never(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    raise AssertionError("not called")
