"""Errors to HTTP status and OpenAI's error body: the only place that knows both."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from colm_serve.errors import (
    ColmError,
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    RateLimited,
    RequestTooLarge,
    ResourceExhausted,
    RowFailed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownRequest,
    WorkerFailed,
)

#: The first that an error is an instance of: status, OpenAI's type, code.
_KINDS: tuple[tuple[type[ColmError], int, str, str], ...] = (
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (UnknownRequest, 404, "invalid_request_error", "request_not_found"),
    (RequestTooLarge, 413, "invalid_request_error", "request_too_large"),
    (InvalidArgument, 400, "invalid_request_error", "invalid_value"),
    (Incompatible, 409, "conflict_error", "incompatible"),
    (Unauthenticated, 401, "authentication_error", "invalid_api_key"),
    (RateLimited, 429, "rate_limit_error", "rate_limit_exceeded"),
    (ResourceExhausted, 429, "rate_limit_error", "overloaded"),
    (Unavailable, 503, "service_unavailable_error", "unavailable"),
    (DataLoss, 502, "api_error", "bad_gateway"),
    (RowFailed, 500, "api_error", "generation_failed"),
    (WorkerFailed, 502, "api_error", "bad_gateway"),
    (DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (ColmError, 500, "api_error", "internal_error"),
)


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: ColmError) -> dict[str, Any]:
    """OpenAI's error body."""
    _, kind, code = _kind(error)
    param = error.field if isinstance(error, InvalidArgument) else None
    return error_body(str(error), kind, code, param)


def respond(error: ColmError) -> JSONResponse:
    """The response to a request that failed before anything was sent."""
    headers = {}
    if isinstance(error, ResourceExhausted):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(describe(error), _kind(error)[0], headers)


def _kind(error: ColmError) -> tuple[int, str, str]:
    for cls, status, kind, code in _KINDS:
        if isinstance(error, cls):
            return status, kind, code
    raise AssertionError("the last kind is every error's")
