"""The OpenAI-compatible API over real HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from colm_serve.config import RouterConfig
from colm_serve.core import SamplingParams
from colm_serve.errors import RowFailed
from colm_serve.router.request import GenerationRequest, TokenPrompt
from tests.router.cluster import (
    MODEL,
    ScriptedCluster,
    scripted_cluster,
    trained_tokenizer,
    until_closed,
)
from tests.router.scripted import Script, continuation

PROMPT = [10, 11, 12]
COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"


def openai_client(cluster: ScriptedCluster) -> openai.AsyncOpenAI:
    base_url = f"http://{cluster.service.http_address}/v1"
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)


def text_of(cluster: ScriptedCluster, tokens: list[int]) -> str:
    return cluster.router.prompt_text(GenerationRequest(TokenPrompt(tuple(tokens))))


async def stream(cluster: ScriptedCluster, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of each server-sent event; [DONE] as that string."""
    events: list[Any] = []
    async with cluster.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def test_completion(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(num_cached=2)) as cluster:
        async with openai_client(cluster) as client:
            reply = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=6, seed=4, extra_body={"level": 2}
            )
        tokens = continuation(PROMPT, 6, 4, 2)
        choice = reply.choices[0]
        assert choice.text == text_of(cluster, tokens)
        assert choice.finish_reason == "length"
        assert choice.model_dump()["level"] == [2] * 6
        assert reply.id == "cmpl-" + cluster.worker.requests[0].request_id
        assert reply.object == "text_completion"
        usage = reply.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 6, 9)
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 2


async def test_streamed_completion(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 6, "seed": 4}
        events = await stream(
            cluster, COMPLETION, {**body, "stream_options": {"include_usage": True}}
        )
        assert events[-1] == "[DONE]"
        usage, chunks = events[-2], events[:-2]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 6
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == text_of(cluster, continuation(PROMPT, 6, 4, 3))
        assert {chunk["choices"][0]["level"] for chunk in chunks} == {3}
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * 6 + ["length"]
        assert len({chunk["id"] for chunk in events[:-1]}) == 1
        assert "usage" not in chunks[0]


@pytest.mark.parametrize(
    "content", ["Say hi.", [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]]
)
async def test_chat(tmp_path: Path, content: Any) -> None:
    async with scripted_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        messages: Any = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
        reply = await client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=5, seed=9
        )
        prompt = cluster.worker.requests[0].prompt
        rendered = trained_text("<|system|>Be brief.<|user|>Say hi.<|assistant|>")
        assert prompt == rendered
        tokens = continuation(prompt, 5, 9, 3)
        assert reply.object == "chat.completion"
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].message.content == text_of(cluster, tokens)
        assert reply.id.startswith("chatcmpl-")


def trained_text(text: str) -> tuple[int, ...]:
    return tuple(trained_tokenizer().encode(text).ids)


async def test_streamed_chat(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=4,
                seed=9,
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].object == "chat.completion.chunk"
        text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
        tokens = continuation(cluster.worker.requests[0].prompt, 4, 9, 3)
        assert text == text_of(cluster, tokens)
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4


async def test_the_synchronous_openai_client(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        base_url = f"http://{cluster.service.http_address}/v1"

        def talk() -> tuple[str, list[str]]:
            with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
                whole = client.completions.create(model=MODEL, prompt="def", max_tokens=5, seed=1)
                parts = client.completions.create(
                    model=MODEL, prompt="def", max_tokens=5, seed=1, stream=True
                )
                return whole.choices[0].text, [part.choices[0].text for part in parts]

        whole, parts = await asyncio.to_thread(talk)
        assert whole == "".join(parts)


@pytest.mark.parametrize(
    "prompts", [["def", "return"], [[10, 11], [12, 13]], ["one"] * 20], ids=str
)
async def test_a_batch_has_a_choice_for_each_prompt(tmp_path: Path, prompts: Any) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = {"prompt": prompts, "max_tokens": 3, "seed": 2}
        reply = (await cluster.http.post(COMPLETION, json=body)).json()
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(prompts)))
        for prompt, choice in zip(prompts, reply["choices"], strict=True):
            ids = prompt if isinstance(prompt, list) else trained_text(prompt)
            assert choice["text"] == text_of(cluster, continuation(ids, 3, 2, 3))
        events = await stream(cluster, COMPLETION, body)
        texts = [""] * len(prompts)
        for chunk in events[:-1]:
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in reply["choices"]]


async def test_stop_strings(tmp_path: Path) -> None:
    words = trained_text("def add(first, second): return")
    async with scripted_cluster(tmp_path, script=Script(text=words)) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 40, "stop": "second"}
        reply = (await cluster.http.post(COMPLETION, json=body)).json()
        assert reply["choices"][0]["text"] == "def add(first, "
        assert reply["choices"][0]["finish_reason"] == "stop"
        events = await stream(cluster, COMPLETION, {**body, "stop": ["nowhere", "second"]})
        text = "".join(chunk["choices"][0]["text"] for chunk in events[:-1])
        assert text == "def add(first, "


@pytest.mark.parametrize("name", [f"{MODEL}:level-2", "level-2"])
@pytest.mark.parametrize("own", [{}, {"level": 2}])
async def test_a_model_s_name_may_say_the_level(
    tmp_path: Path, name: str, own: dict[str, int]
) -> None:
    body = {"model": name, "max_tokens": 4, **own}
    async with scripted_cluster(tmp_path) as cluster:
        for path, prompt in (
            (COMPLETION, {"prompt": PROMPT}),
            (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ):
            reply = (await cluster.http.post(path, json={**body, **prompt})).json()
            assert reply["choices"][0]["level"] == [2] * 4
            assert reply["model"] == MODEL


@pytest.mark.parametrize(
    "name",
    [
        "another:level-2",
        f"{MODEL}:level-0",
        f"{MODEL}:level-4",
        f"{MODEL}:level-",
        "level-4",
        ":level-2",
        MODEL[1:],
    ],
)
async def test_another_model_is_not_found(tmp_path: Path, name: str) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        response = await cluster.http.post(COMPLETION, json={"prompt": PROMPT, "model": name})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["param"] == "model"
    allowed = f"allowed: {MODEL} (:level-1 to :level-3)"
    assert error["message"] == f"model: {name!r} is not allowed; {allowed}"


async def test_models_health_and_metrics(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        async with openai_client(cluster) as client:
            models = await client.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await cluster.http.get("/health")).status_code == 200
        await cluster.http.post(COMPLETION, json={"prompt": PROMPT, "max_tokens": 4, "level": 2})
        await cluster.http.post(COMPLETION, json={"prompt": PROMPT, "level": 9})
        response = await cluster.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        for line in (
            "colm:time_to_first_token_seconds_count 1.0",
            "colm:inter_token_latency_seconds_count 3.0",
            "colm:e2e_request_latency_seconds_count 1.0",
            "colm:num_requests_running 0.0",
            "colm:prompt_tokens_total 3.0",
            'colm:generation_tokens_total{level="2"} 4.0',
            'colm:request_success_total{finished_reason="length"} 1.0',
            'colm:request_errors_total{code="INVALID_ARGUMENT"} 1.0',
            'colm:request_level_total{level="2"} 1.0',
            'colm:kv_cache_usage_perc{kind="decode",worker="d0"} 0.0',
            'colm:worker_reachable{kind="decode",worker="d0"} 1.0',
            'colm:row_failures{kind="decode",worker="d0"} 2.0',
        ):
            assert line in lines


async def test_health_is_503_without_a_decode_worker(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        await cluster.worker.stop()
        await cluster.until(lambda: not cluster.router.view.has_reachable_decode())
        response = await cluster.http.get("/health")
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "no decode worker is reachable"


HELLO = {"messages": [{"role": "user", "content": "hello"}]}
BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [[]]}, "prompt"),
    (COMPLETION, {"prompt": {"text": "x"}}, "prompt"),
    (COMPLETION, {"prompt": [1, "x"]}, "prompt"),
    (COMPLETION, {}, "prompt"),
    (COMPLETION, {"prompt": [300]}, "prompt[0]"),
    (COMPLETION, {"prompt": [5, -1]}, "prompt[1]"),
    (COMPLETION, {"prompt": [5] * 128}, "prompt"),
    (COMPLETION, {"prompt": [5] * 100, "max_tokens": 29}, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (COMPLETION, {"prompt": "x", "temperature": 2.5}, "temperature"),
    (COMPLETION, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (COMPLETION, {"prompt": "x", "top_p": 0}, "top_p"),
    (COMPLETION, {"prompt": "x", "top_k": -1}, "top_k"),
    (COMPLETION, {"prompt": "x", "seed": -1}, "seed"),
    (COMPLETION, {"prompt": "x", "seed": 2**64}, "seed"),
    (COMPLETION, {"prompt": "x", "stop": ["a", ""]}, "stop"),
    (COMPLETION, {"prompt": "x", "stop": ["a"] * 17}, "stop"),
    (COMPLETION, {"prompt": "x", "stop": 5}, "stop"),
    (COMPLETION, {"prompt": "x", "sla_class": "gold"}, "sla_class"),
    (COMPLETION, {"prompt": "x", "cache_salt": "s" * 257}, "cache_salt"),
    (COMPLETION, {"prompt": "x", "ttft_ms": 0}, "ttft_ms"),
    (COMPLETION, {"prompt": "x", "tpot_ms": "fast"}, "tpot_ms"),
    (COMPLETION, {"prompt": "x", "ttft_ms": 1e-322}, "ttft_ms"),
    (COMPLETION, {"prompt": "x", "tpot_ms": 1e-322}, "tpot_ms"),
    (COMPLETION, {"prompt": "x", "deadline_s": 1e-322}, "deadline_s"),
    (COMPLETION, {"prompt": "x", "deadline_s": 1e6}, "deadline_s"),
    (COMPLETION, {"prompt": "x", "level": 0}, "level"),
    (COMPLETION, {"prompt": "x", "level": 4}, "level"),
    (COMPLETION, {"prompt": "x", "model": f"{MODEL}:level-2", "level": 1}, "level"),
    (COMPLETION, {"prompt": "x", "model": f"{MODEL}:level-2", "min_level": 1}, "level"),
    (COMPLETION, {"prompt": "x", "level": 2, "min_level": 1}, "level"),
    (COMPLETION, {"prompt": "x", "min_level": 3, "max_level": 2}, "min_level"),
    (COMPLETION, {"prompt": "x", "n": 0}, "n"),
    (COMPLETION, {"prompt": "x", "n": 129}, "n"),
    (COMPLETION, {"prompt": "x", "n": "two"}, "n"),
    (COMPLETION, {"prompt": "x", "logprobs": -1}, "logprobs"),
    (COMPLETION, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (COMPLETION, {"prompt": "x", "logprobs": True}, "logprobs"),
    (COMPLETION, {"prompt": "x", "best_of": 3}, "best_of"),
    (COMPLETION, {"prompt": "x", "echo": "yes"}, "echo"),
    (COMPLETION, {"prompt": "x", "echo": True, "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "x", "echo": True, "logprobs": 21}, "logprobs"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"five": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"-5": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"5": "much"}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    (COMPLETION, {"prompt": "x", "presence_penalty": 2.5}, "presence_penalty"),
    (COMPLETION, {"prompt": "x", "frequency_penalty": -2.5}, "frequency_penalty"),
    (COMPLETION, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETION, {"prompt": "x", "repetition_penalty": 2.5}, "repetition_penalty"),
    (COMPLETION, {"prompt": "x", "min_p": 1.5}, "min_p"),
    (COMPLETION, {"prompt": "x", "min_p": -0.5}, "min_p"),
    (COMPLETION, {"prompt": "x", "min_tokens": -1}, "min_tokens"),
    (COMPLETION, {"prompt": "x", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [300]}, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [5] * 65}, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": 5}, "stop_token_ids"),
    (CHAT, {**HELLO, "logprobs": 5}, "logprobs"),
    (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {**HELLO, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {**HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    (CHAT, {**HELLO, "guided_json": {"type": "object"}}, "guided_json"),
]


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ('"top_p": 1e-50', "top_p: 1e-50 is not allowed; allowed: 1e-09 to 1"),
        ('"repetition_penalty": 1e-50', "repetition_penalty: 1e-50 is not allowed"),
        ('"repetition_penalty": 1e-38', "repetition_penalty: 1e-38 is not allowed"),
        ('"temperature": 2.1', "temperature: 2.1 is not allowed; allowed: 0 to 2"),
        ('"temperature": 1e400', "temperature: inf is not allowed; allowed: 0 to 2"),
        ('"presence_penalty": -1e300', "presence_penalty: -1e+300 is not allowed"),
        ('"logit_bias": {"5": 100.1}', "logit_bias[5]: 100.1 is not allowed"),
        (f'"min_p": {10**400}', "min_p: "),
        (f'"top_k": -{10**400}', "top_k: "),
        (f'"seed": {10**400}', "seed: "),
    ],
    ids=lambda text: text[:30],
)
async def test_a_number_is_shown_as_it_was_sent(tmp_path: Path, fields: str, shown: str) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = f'{{"prompt": "x", {fields}}}'
        response = await cluster.http.post(COMPLETION, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(shown)
        assert cluster.worker.requests == []


async def test_numbers_come_to_the_worker_as_the_router_checked_them(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for temperature, carried in ((1e-50, 0.0), (1e-6, 0.0), (1e-3, 0.0010000000474974513)):
            body = {
                "prompt": "x", "max_tokens": 1, "seed": 1, "temperature": temperature,
                "top_p": 1e-6, "min_p": 1e-50, "repetition_penalty": 0.01,
            }  # fmt: skip
            response = await cluster.http.post(COMPLETION, json=body)
            assert response.status_code == 200, response.text
            sampling = cluster.worker.requests[-1].sampling
            assert sampling == SamplingParams(
                1, temperature=temperature, top_p=1e-6, seed=1, min_p=0, repetition_penalty=0.01
            )
            assert sampling.temperature == carried


async def test_bad_fields_are_named(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for path, body, field in BAD_FIELDS:
            # A streamed request that is refused is no stream.
            response = await cluster.http.post(path, json={"stream": True, **body})
            assert response.status_code == 400, (body, response.text)
            error = response.json()["error"]
            assert error["param"].startswith(field), (body, error)
            assert field in error["message"]
            assert error["type"] == "invalid_request_error"
        assert cluster.worker.requests == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'"text"',
        b"[]",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
    ],
)
async def test_bad_bodies_are_400(tmp_path: Path, raw: bytes) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        response = await cluster.http.post(COMPLETION, content=raw)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


LONG_INTEGERS = [
    *(f'"{name}": %s' for name in (
        "max_tokens", "seed", "n", "level", "min_level", "max_level", "logprobs", "min_tokens",
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "best_of",
        "frequency_penalty", "ttft_ms", "tpot_ms", "deadline_s", "stop", "echo", "stream",
    )),
    '"stop_token_ids": [%s]',
    '"logit_bias": {"5": %s}',
    '"logit_bias": {"%s": 1}',
    '"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": %s}}}',
    '"structured_outputs": {"json": {"minimum": %s}}',
    '"structured_outputs": {"json": "{\\"minimum\\": %s}"}',
    '"structured_outputs": {"choice": %s}',
    '"structured_outputs": {"%s": 1}',
    '"prompt": [%s]',
    '"prompt": [[1], [%s]]',
]  # fmt: skip


async def test_integers_of_any_length_are_400(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for field in LONG_INTEGERS:
            for digits in ("9" * 5_000, "-" + "9" * 4_000):
                raw = '{"prompt": "x", ' + field % digits + "}"
                response = await cluster.http.post(COMPLETION, content=raw)
                assert response.status_code == 400, (field, response.text)
                assert response.json()["error"]["param"], field
        assert cluster.worker.requests == []


async def test_every_error_can_be_read_whatever_was_sent(tmp_path: Path) -> None:
    odd = "\\ud83d \\udfff \\u0000 é " * 1_000
    bodies = [
        '{"prompt": "x", "model": "é\\u0000\\u2028🙂' + "é" * 9_000 + '"}',
        '{"prompt": "x", "sla_class": "' + "🙂" * 9_000 + '"}',
        '{"prompt": "' + odd + '"}',
        '{"prompt": "x", "logit_bias": {"' + "é\\u0000" * 900 + '": 1}}',
        '{"prompt": "x", "structured_outputs": {"é\\u0000🙂": 1}}',
        '{"prompt": "x", "structured_outputs": {"json": "\\"\\\\ud800\\""}}',
        '{"prompt": "x", "structured_outputs": {"json": "{\\"a\\": \\\\ud800}"}}',
        '{"prompt": "x", "response_format": {"type": "é\\u0000🙂"}}',
    ]
    async with scripted_cluster(tmp_path) as cluster:
        for raw in bodies:
            response = await cluster.http.post(COMPLETION, content=raw)
            assert response.status_code in (400, 404), (raw[:80], response.text)
            assert response.json()["error"]["message"]
            assert len(response.content) < 9_000
        for path in ("/v1/%ff%fe", "/v1/%ed%a0%80", "/%00"):
            assert (await cluster.http.get(path)).json()["error"]["code"] == "not_found"


async def test_unknown_paths_methods_and_models(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        assert (await cluster.http.get("/v2/nothing")).json()["error"]["code"] == "not_found"
        assert (await cluster.http.get(COMPLETION)).status_code == 405
        response = await cluster.http.post(COMPLETION, json={"prompt": "x", "model": "gpt-9"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"


async def test_harmless_fields_are_accepted(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = {
            "prompt": "x",
            "max_tokens": 1,
            "user": "u1",
            "n": 1,
            "best_of": None,
            "logprobs": None,
            "echo": False,
            "presence_penalty": 0.0,
            "top_k": 2**40,
            "some_future_field": {"a": 1},
        }
        assert (await cluster.http.post(COMPLETION, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.FAILED_PRECONDITION, 409),
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.DATA_LOSS, 502),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (grpc.StatusCode.INTERNAL, 502),
    ],
)
async def test_what_a_worker_refuses_has_its_own_status(
    tmp_path: Path, code: grpc.StatusCode, status: int
) -> None:
    script = Script(fail_start=code, retry_after_ms=2500)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}):
            response = await cluster.http.post(COMPLETION, json=body)
            assert response.status_code == status, response.text
            assert "error" in response.json()
            assert ("retry-after" in response.headers) == (status == 429)


async def test_where_nothing_may_wait_overload_is_429_at_once(tmp_path: Path) -> None:
    router = RouterConfig(status_interval_s=0.02, max_concurrent=1, max_queued=0)
    script = Script(hold_after=0)
    async with scripted_cluster(tmp_path, script=script, router=router) as cluster:
        held = asyncio.create_task(cluster.http.post(COMPLETION, json={"prompt": PROMPT}))
        await cluster.worker.held.wait()
        response = await cluster.http.post(COMPLETION, json={"prompt": PROMPT})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        cluster.worker.resume.set()
        assert (await held).status_code == 200


async def test_an_error_after_the_begin_is_an_event(tmp_path: Path) -> None:
    script = Script(fail_after=2, fail_with_error=RowFailed("no numbers"))
    async with scripted_cluster(tmp_path, script=script) as cluster:
        events = await stream(cluster, COMPLETION, {"prompt": PROMPT})
        assert [list(event) == ["error"] for event in events] == [False, False, True]
        assert events[-1]["error"]["code"] == "generation_failed"


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_a_client_that_goes_away_frees_the_worker(
    tmp_path: Path, is_streamed: bool, hold_after: int
) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=hold_after)) as cluster:
        body = {"prompt": [PROMPT, PROMPT], "stream": is_streamed}
        asking = asyncio.create_task(
            httpx.AsyncClient(base_url=cluster.http.base_url).post(COMPLETION, json=body)
        )
        await cluster.worker.held.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until_closed(cluster.worker)
        assert cluster.worker.num_cancelled == len(cluster.worker.requests) == 2
