"""What is large is refused by its size, or read where it holds nobody up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from colm_serve.client import Token
from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument, RequestTooLarge
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.router.openai import bodies
from colm_serve.router.reading import encode as encoding
from colm_serve.router.reading import reader as reading
from colm_serve.router.request import ChatMessage, ChatPrompt, GenerationRequest, TextPrompt
from colm_serve.router.tokenizer import Tokenizer
from colm_serve.transport.channel import connect
from colm_serve.transport.status import ERROR_KEY, FIELD_KEY
from tests.router.cluster import (
    CHAT_TEMPLATE,
    MAX_CONTEXT,
    MODEL,
    ScriptedCluster,
    save_tokenizer,
    scripted_cluster,
    trained_tokenizer,
)
from tests.router.scripted import Script

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(autouse=True)
def only_small_ones_are_read_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing large is parsed, rendered or encoded in the router's own process."""
    read_body, encode = bodies.read_body, encoding.encode
    sizes: list[int] = []

    def small_body(kind: Any, raw: bytes, *rest: Any) -> Any:
        sizes.append(len(raw) - reading.SMALL_BYTES)
        return read_body(kind, raw, *rest)

    def small_prompt(tokenizer: Any, prompt: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(prompt, TextPrompt):
            sizes.append(len(prompt.text) - reading.SMALL_TEXT_CHARS)
        else:
            sizes.append(len(prompt.messages) - reading.SMALL_CHAT_MESSAGES)
            sizes.append(sum(len(m.content) for m in prompt.messages) - reading.SMALL_CHAT_CHARS)
        return encode(tokenizer, prompt, *rest, **options)

    monkeypatch.setattr(reading, "read_body", small_body)
    monkeypatch.setattr(reading, "encode", small_prompt)
    yield
    assert all(size <= 0 for size in sizes)


def with_schema(num_properties: int) -> dict[str, Any]:
    properties = {f"property_{i}": {"type": "string"} for i in range(num_properties)}
    schema = {"type": "object", "properties": properties}
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


TOO_MUCH: list[tuple[str, dict[str, Any] | str, int, str]] = [
    (COMPLETION, {"prompt": "x" * 10_000_000}, 413, "body"),
    (COMPLETION, {"prompt": "x" * 2_000_001}, 413, "prompt"),
    (COMPLETION, {"prompt": ["x"] * 100_000}, 400, "prompt"),
    (COMPLETION, {"prompt": [[]] * 100_000}, 400, "prompt"),
    (COMPLETION, {"prompt": [1] * 1_048_577}, 400, "prompt"),
    (COMPLETION, {"prompt": [[1] * 300] * 4_000}, 400, "prompt"),
    (COMPLETION, {"prompt": [[1] * 2_000] * 1_000}, 400, "prompt"),
    (COMPLETION, {"prompt": ["x"] * 1_000, "n": 3}, 400, "n"),
    (CHAT, {"messages": [HELLO] * 10_000}, 400, "messages"),
    (CHAT, {"messages": [{**HELLO, "content": "x" * 2_000_000}]}, 413, "messages"),
    (COMPLETION, {"prompt": "x", "stop": ["y" * 1_000_000]}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "stop": ["y"] * 200_000}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(9_000)}}, 400, "logit"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [1] * 100_000}, 400, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", **with_schema(5_000)}, 400, "response_format"),
    (COMPLETION, {"prompt": "x", **with_schema(2_000)}, 400, "response_format.json_schema.schema"),
    (COMPLETION, {"prompt": "x", "more": {str(i): 1 for i in range(10_001)}}, 400, "body"),
    (COMPLETION, '{"prompt": "x", "more": ' + "[" * 65 + "]" * 65 + "}", 400, "body"),
    (COMPLETION, '{"prompt": "x", "more": ' + "[" * 50_000, 400, "body"),
]


async def test_too_much_of_anything_is_refused_by_name(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for path, body, status, field in TOO_MUCH:
            raw = body if isinstance(body, str) else json.dumps(body)
            response = await cluster.http.post(path, content=raw)
            assert response.status_code == status, (raw[:80], response.text)
            error = response.json()["error"]
            assert error["param"].startswith(field), error
            assert error["code"] == ("request_too_large" if status == 413 else "invalid_value")
        assert cluster.worker.requests == []


async def test_streams_go_on_beside_what_is_large(tmp_path: Path) -> None:
    script = Script(hold_after=2)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        running = [asyncio.create_task(_num_tokens(cluster, max_tokens=20)) for _ in range(10)]
        await cluster.worker.held.wait()
        large = [
            asyncio.create_task(cluster.http.post(path, content=_raw(body)))
            for path, body, _, _ in TOO_MUCH
        ]
        cluster.worker.resume.set()
        assert await asyncio.gather(*running) == [20] * 10
        assert {response.status_code for response in await asyncio.gather(*large)} == {400, 413}


def _raw(body: dict[str, Any] | str) -> str:
    return body if isinstance(body, str) else json.dumps(body)


async def _num_tokens(cluster: ScriptedCluster, max_tokens: int) -> int:
    events = cluster.client.generate(token_ids=[5, 6], max_tokens=max_tokens)
    return len([event async for event in events if isinstance(event, Token)])


async def test_a_text_that_cannot_fit_is_not_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(map(len, trained_tokenizer().get_vocab()))
    monkeypatch.setattr(Tokenizer, "_encode", None)
    async with scripted_cluster(tmp_path) as cluster:
        body: dict[str, Any] = {"prompt": "x" * (MAX_CONTEXT * longest + 1)}
        response = await cluster.http.post(COMPLETION, json=body)
        assert response.status_code == 413
        message = response.json()["error"]["message"]
        assert f"{MAX_CONTEXT * longest + 1} characters" in message
        assert f"at most {MAX_CONTEXT * longest}" in message
        body = {"messages": [{"role": "user", "content": "x" * (MAX_CONTEXT * longest)}]}
        response = await cluster.http.post(CHAT, json=body)
        assert response.status_code == 413
        assert response.json()["error"]["param"] == "messages"


def a_reader(folder: Path, max_context: int = 100_000) -> tuple[reading.Reader, Tokenizer]:
    save_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    limits = LimitsConfig()
    return reading.Reader(limits, {MODEL: (str(folder), max_context)}), tokenizer


async def test_what_is_read_elsewhere_is_what_would_be_read_here(tmp_path: Path) -> None:
    reader, tokenizer = a_reader(tmp_path)
    text = "def add(first, second): # naïve façade, 東京, 🙂\n" * 2_000
    many = tuple(ChatMessage("user", f"é {i} <|user|>") for i in range(200))
    try:
        one = (ChatMessage("user", text),)
        literal = GenerationRequest(TextPrompt("<|user|>"), parse_special=False)
        for request, expected in (
            (GenerationRequest(TextPrompt(text)), tokenizer.encode(text)),
            (literal, tokenizer.encode("<|user|>", parse_special=False)),
            (GenerationRequest(ChatPrompt(many)), tokenizer.encode_chat(many)),
            (GenerationRequest(ChatPrompt(one)), tokenizer.encode_chat(one)),
        ):
            assert await reader.encode(MODEL, tokenizer, request) == expected
        with pytest.raises(InvalidArgument, match="lone surrogates"):
            await reader.encode(MODEL, tokenizer, GenerationRequest(TextPrompt(text + "\ud800")))
        chat = ChatPrompt((ChatMessage("<|user|>", "x"),) * 100)
        with pytest.raises(InvalidArgument, match=r"messages\[0\]\.role"):
            await reader.encode(MODEL, tokenizer, GenerationRequest(chat))
    finally:
        await reader.close()


async def test_what_does_not_come_to_an_end_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CPU_S", 1.0)
    monkeypatch.setattr(reading, "NUM_PROCESSES", 1)
    for_ever = "{% for m in messages %}" + "{% for i in range(99999) %}" * 2
    for_ever += "{% endfor %}" * 3
    reader, tokenizer = a_reader(tmp_path)
    broken = "{% if messages | length > 99 %}" + for_ever + "{% endif %}" + CHAT_TEMPLATE
    save_tokenizer(tmp_path, chat_template=broken)
    try:
        many = ChatPrompt((ChatMessage("user", "hello"),) * 100)
        with pytest.raises(RequestTooLarge, match=r"messages: .* is read within 1 s") as error:
            await reader.encode(MODEL, tokenizer, GenerationRequest(many))
        assert error.value.field == "messages"
        fewer = (ChatMessage("user", "hello"),) * 99
        got = await reader.encode(MODEL, tokenizer, GenerationRequest(ChatPrompt(fewer)))
        assert got == tokenizer.encode_chat(fewer)
    finally:
        await reader.close()
    assert not [p for p in psutil.Process().children() if "reading.program" in str(p.cmdline())]


@pytest.mark.parametrize(
    ("fields", "name", "field"),
    [
        ({"prompt": "x" * 10_000_000}, "RequestTooLarge", b"request"),
        ({"prompt": "x" * 3_000_000}, "RequestTooLarge", b"prompt"),
        ({"prompt": "x", "stop": ["y"] * 100_000}, None, b"stop"),
        ({"prompt": "x", "stop": ["y" * 4097]}, None, b"stop"),
        ({"prompt_token_ids": {"ids": [1] * 2_000_000}}, None, b"prompt"),
        ({"chat": {"messages": [HELLO] * 10_000}}, None, b"messages"),
        ({"chat": {"messages": [HELLO] * 2_049}}, None, b"messages"),
        ({"prompt": "x", "sampling": {"stop_token_ids": [1] * 70_000}}, None, b"stop_token_ids"),
    ],
)
async def test_large_messages_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], name: str | None, field: bytes
) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as channel,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generation_pb2.GenerateRequest(**fields), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        trailing = dict(error.value.trailing_metadata())
        assert trailing.get(ERROR_KEY) == name
        assert trailing[FIELD_KEY] == field


async def test_other_methods_take_small_messages(tmp_path: Path) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as channel,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        message = generation_pb2.SetLevelRequest(request_id="x" * 40_000, level=1)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.SetLevel(message, timeout=60)
        assert dict(error.value.trailing_metadata())[ERROR_KEY] == "RequestTooLarge"
