"""What another process has read is what would have been read here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument, RequestTooLarge
from colm_serve.proto.colm.v1 import generation_pb2
from colm_serve.router.openai.bodies import ChatBody, CompletionBody, read_body
from colm_serve.router.reading.asked import Asked
from colm_serve.router.reading.calls import pack_call, unpack_answer
from colm_serve.router.reading.program import make_work
from colm_serve.router.request import GenerationRequest, TokenPrompt

LIMITS = LimitsConfig()
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "naïve 東京 🙂\n"},
    {"prompt": ["a", "b"], "n": 3, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": [1, 2, 2**32 - 1], "echo": True, "logprobs": 2},
    {"prompt": [[1], [2, 3]], "stop": ["x", "y"], "stop_token_ids": [7, 10**30]},
    {"prompt": "x", "top_k": 10**40, "seed": -(10**40), "min_tokens": 2**64 - 1, "level": 2},
    {"prompt": "x", "logit_bias": {"5": 1.5, "0": -2}, "temperature": 0.1, "cache_salt": "s"},
    {"prompt": "x", "structured_outputs": {"regex": "[a-z]{3}"}, "parse_special": False},
    {"prompt": "x", "response_format": {"type": "json_object"}, "ttft_ms": 1e-322},
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "é"}]}]},
    {"messages": [{"role": "user", "content": ""}] * 3, "logprobs": True, "top_logprobs": 2},
]


@pytest.mark.parametrize(
    ("kind", "body"),
    [*((CompletionBody, body) for body in COMPLETIONS), *((ChatBody, body) for body in CHATS)],
)
def test_a_body_that_was_packed(
    kind: type[CompletionBody] | type[ChatBody], body: dict[str, Any]
) -> None:
    raw = json.dumps(body).encode()
    asked = read_body(kind, raw, LIMITS)
    work = make_work(LIMITS.model_dump(), {})
    assert Asked.unpack(unpack_answer(work(pack_call("body", kind.name, raw)))) == asked
    assert [request.prompt for request in asked.requests] == list(asked.prompts)


@pytest.mark.parametrize(
    ("kind", "body", "error", "field"),
    [
        (CompletionBody, {"prompt": 5}, InvalidArgument, "prompt"),
        (CompletionBody, {"prompt": "x" * 2_000_001}, RequestTooLarge, "prompt"),
        (CompletionBody, {"prompt": ["x" * 2_000_001, "x"]}, RequestTooLarge, "prompt"),
        (ChatBody, {"messages": [{"role": "user"}]}, InvalidArgument, "messages.0.content"),
    ],
)
def test_an_error_that_was_packed(
    kind: type[CompletionBody], body: dict[str, Any], error: type[InvalidArgument], field: str
) -> None:
    raw = json.dumps(body).encode()
    with pytest.raises(InvalidArgument) as here:
        read_body(kind, raw, LIMITS)
    answer = make_work(LIMITS.model_dump(), {})(pack_call("body", kind.name, raw))
    with pytest.raises(InvalidArgument) as there:
        unpack_answer(answer)
    for raised in (here.value, there.value):
        assert type(raised) is error
        assert (raised.field, str(raised)) == (field, str(here.value))
        assert raised.allowed == here.value.allowed


@pytest.mark.parametrize(
    ("limit", "most", "body"),
    [
        ("max_prompt_chars", 3, {"prompt": "four"}),
        ("max_prompts", 2, {"prompt": ["a"] * 3}),
        ("max_token_ids", 3, {"prompt": [[1, 2], [3, 4]]}),
        ("max_token_ids", 3, {"prompt": [1, 2, 3, 4]}),
        ("max_choices", 2, {"prompt": "a", "n": 3}),
        ("max_generations", 5, {"prompt": ["a"] * 2, "n": 3}),
        ("max_stop_strings", 1, {"prompt": "a", "stop": ["b", "c"]}),
        ("max_stop_chars", 3, {"prompt": "a", "stop": ["bb", "cc"]}),
        ("max_json_depth", 2, {"prompt": "a", "response_format": {"type": {"a": [1]}}}),
        ("max_json_keys", 1, {"prompt": "a", "structured_outputs": {"json": {"a": 1}}}),
        ("max_json_keys", 1, {"prompt": "a", "x": 1, "y": 2}),
    ],
)
def test_each_limit_is_the_config_s(limit: str, most: int, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    with pytest.raises(InvalidArgument, match=rf"\b{most}\b"):
        read_body(CompletionBody, raw, LIMITS.model_copy(update={limit: most}))
    if "type" not in str(body):
        read_body(CompletionBody, raw, LIMITS)


@pytest.mark.parametrize("token_id", [-1, 2**32, 10**400])
def test_no_vocabulary_has_such_a_token(token_id: int) -> None:
    asked = Asked(GenerationRequest(TokenPrompt(())), (TokenPrompt((5, token_id)),))
    with pytest.raises(InvalidArgument, match=r"prompt\[1\]"):
        asked.pack()


def test_a_message_that_is_fine_and_those_that_are_not() -> None:
    work = make_work(LIMITS.model_dump(), {})

    def look(message: generation_pb2.GenerateRequest) -> bytes:
        return unpack_answer(work(pack_call("message", message.SerializeToString())))

    assert look(generation_pb2.GenerateRequest(prompt="x")) == b""
    with pytest.raises(InvalidArgument, match="stop: 'a list of 17'"):
        look(generation_pb2.GenerateRequest(prompt="x", stop=["y"] * 17))
    with pytest.raises(InvalidArgument, match="stop: '4097 characters'"):
        look(generation_pb2.GenerateRequest(prompt="x", stop=["y" * 4097]))
    with pytest.raises(InvalidArgument, match=r"colm\.v1\.GenerateRequest"):
        unpack_answer(work(pack_call("message", b"\xff\xff")))


def test_the_process_is_light() -> None:
    program = (
        "import sys, colm_serve.router.reading.program\n"
        "print([m for m in ('torch', 'ray', 'grpc', 'numpy', 'fastapi') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
