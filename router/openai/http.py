"""The OpenAI-compatible HTTP API: translates between JSON and the router."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from colm_serve.errors import ColmError, RequestTooLarge, Unavailable
from colm_serve.router.metrics import CONTENT_TYPE
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.openai.bodies import ChatBody, CompletionBody
from colm_serve.router.openai.choices import choices
from colm_serve.router.openai.closing import ClosingResponse
from colm_serve.router.openai.errors import describe, error_body, respond
from colm_serve.router.openai.format import CHAT, COMPLETION, Answer, Format
from colm_serve.router.openai.level_headers import level_headers
from colm_serve.router.openai.merge import merge
from colm_serve.router.request import GenerationEvent, Started
from colm_serve.router.router import Router

#: Prompts of one batch, and choices of one prompt, that are generated at the same time.
MAX_BATCH_CONCURRENT = 16
_CLIENT_CLOSED_REQUEST = 499
_MAX_LENGTH_DIGITS = 18

_Events = AsyncGenerator[tuple[int, GenerationEvent], None]
T = TypeVar("T")


def make_app(router: Router) -> FastAPI:
    """The app; it holds nothing but the router."""
    app = FastAPI(title="colm-serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ColmError, _colm_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(router, request, CompletionBody, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _generate(router, request, ChatBody, CHAT)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        router.tenants.authenticate(request.headers.get("authorization"))
        return {"object": "list", "data": [_describe_model(model) for model in router.models]}

    @app.get("/health")
    async def health() -> Response:
        if not router.view.has_reachable_decode():
            return respond(Unavailable("no decode worker is reachable"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.render_metrics(), media_type=CONTENT_TYPE)

    return app


def _describe_model(model: ModelFacts) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "colm-serve",
        "max_model_len": model.max_context,
        "num_levels": model.num_levels,
    }


async def _generate(
    router: Router, request: Request, kind: type[CompletionBody] | type[ChatBody], style: Format
) -> Response:
    tenant = router.tenants.authenticate(request.headers.get("authorization"))
    body = await _read(request, router.reader.limits.max_body_bytes)
    asked = await router.reader.body(kind, body)
    requests, num_choices = asked.requests, asked.num_choices
    echoes = None
    if asked.is_echoed:
        echoes = await asyncio.to_thread(lambda: [router.prompt_text(r) for r in requests])
    answer = Answer(style, int(time.time()), len(requests), num_choices, echoes)
    generate = partial(router.generate, tenant=tenant)
    streams = chain.from_iterable(choices(generate, r, num_choices) for r in requests)
    num_concurrent = min(MAX_BATCH_CONCURRENT, tenant.config.max_concurrent or MAX_BATCH_CONCURRENT)
    events = merge(tuple(streams), num_concurrent)
    # The first event is awaited before anything is sent, so that a refusal has its own status.
    work = _first(events) if asked.is_streamed else _whole(events, answer)
    result = await _until_disconnect(request, work)
    if result is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    if isinstance(result, tuple):
        return EventStream(result, events, answer, includes_usage=asked.includes_usage)
    return JSONResponse(result, headers=level_headers(answer.starts))


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, the generations end with it."""

    def __init__(
        self,
        first: tuple[int, GenerationEvent],
        events: _Events,
        answer: Answer,
        *,
        includes_usage: bool,
    ) -> None:
        self._events = events
        lines = _lines(first, events, answer, includes_usage=includes_usage)
        starts = [event for event in first[1:] if isinstance(event, Started)]
        headers = {
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            **level_headers(starts),
        }
        super().__init__(lines, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _lines(
    first: tuple[int, GenerationEvent], events: _Events, answer: Answer, *, includes_usage: bool
) -> AsyncGenerator[str, None]:
    try:
        for chunk in answer.add(*first):
            yield _line(chunk)
        async for index, event in events:
            for chunk in answer.add(index, event):
                yield _line(chunk)
    except ColmError as error:
        yield _line(describe(error))
        return
    if includes_usage:
        yield _line(answer.usage_chunk())
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _first(events: _Events) -> tuple[int, GenerationEvent]:
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise


async def _whole(events: _Events, answer: Answer) -> dict[str, Any]:
    try:
        async for index, event in events:
            answer.add(index, event)
    finally:
        await events.aclose()
    return answer.whole()


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; None once the client has gone, which cancels the work."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, most: int) -> bytes:
    """The body; raises RequestTooLarge as soon as it is known to be more."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and (len(said) > _MAX_LENGTH_DIGITS or int(said) > most):
        raise _BodyTooLarge(f"{said} bytes", most)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _BodyTooLarge(f"over {most} bytes", most)
    return bytes(body)


class _BodyTooLarge(RequestTooLarge):
    """Its rest is not read."""

    def __init__(self, shown: str, most: int) -> None:
        super().__init__("body", shown, f"at most {most} bytes")


async def _colm_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ColmError)
    response = respond(error)
    return ClosingResponse(response) if isinstance(error, _BodyTooLarge) else response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(message, "invalid_request_error", "not_found")
    return JSONResponse(body, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("internal error", "api_error", "internal_error"), 500)
