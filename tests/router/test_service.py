"""The gRPC API at its edges: bad input, health, reflection, status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from colm_serve.client import Options
from colm_serve.config import RouterConfig, SlaClass
from colm_serve.errors import InvalidArgument
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.router.request import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from colm_serve.router.validation import DEFAULT_MAX_TOKENS, Validator
from colm_serve.transport.channel import connect
from colm_serve.transport.status import FIELD_KEY
from tests.router.cluster import (
    MAX_CONTEXT,
    MODEL,
    model_facts,
    scripted_cluster,
    trained_tokenizer,
)
from tests.router.scripted import Script

GENERATE = "/colm.v1.GenerationService/Generate"


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", **fields}


def sampled(**fields: Any) -> dict[str, Any]:
    return text(sampling=fields)


BAD: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({}, grpc.StatusCode.INVALID_ARGUMENT, "input"),
    ({"prompt": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ({"prompt_token_ids": {"ids": []}}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ({"prompt_token_ids": {"ids": [4, 300]}}, grpc.StatusCode.INVALID_ARGUMENT, "prompt[1]"),
    ({"prompt_token_ids": {"ids": [4] * 128}}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ({"chat": {"messages": []}}, grpc.StatusCode.INVALID_ARGUMENT, "messages"),
    (
        {"chat": {"messages": [{"role": "tool", "content": "x"}]}},
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages[0].role",
    ),
    (text(model="gpt-9"), grpc.StatusCode.NOT_FOUND, "model"),
    (text(sla_class="gold"), grpc.StatusCode.INVALID_ARGUMENT, "sla_class"),
    (text(level=0), grpc.StatusCode.INVALID_ARGUMENT, "level"),
    (text(level=4), grpc.StatusCode.INVALID_ARGUMENT, "level"),
    (text(min_level=-1), grpc.StatusCode.INVALID_ARGUMENT, "min_level"),
    (text(max_level=9), grpc.StatusCode.INVALID_ARGUMENT, "max_level"),
    (text(min_level=3, max_level=1), grpc.StatusCode.INVALID_ARGUMENT, "min_level"),
    (text(level=1, max_level=2), grpc.StatusCode.INVALID_ARGUMENT, "level"),
    (text(ttft_ms=0.0), grpc.StatusCode.INVALID_ARGUMENT, "ttft_ms"),
    (text(tpot_ms=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "tpot_ms"),
    (text(tpot_ms=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "tpot_ms"),
    (text(deadline_s=float("inf")), grpc.StatusCode.INVALID_ARGUMENT, "deadline_s"),
    (text(ttft_ms=9e7), grpc.StatusCode.INVALID_ARGUMENT, "ttft_ms"),
    (text(tpot_ms=1e-322), grpc.StatusCode.INVALID_ARGUMENT, "tpot_ms"),
    (text(deadline_s=5e-324), grpc.StatusCode.INVALID_ARGUMENT, "deadline_s"),
    (text(deadline_s=86401.0), grpc.StatusCode.INVALID_ARGUMENT, "deadline_s"),
    (text(stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    (text(stop=["x"] * 17), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    (sampled(temperature=2.1), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (sampled(temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (sampled(top_p=0.0), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
    (sampled(top_k=-1), grpc.StatusCode.INVALID_ARGUMENT, "top_k"),
    (sampled(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    (sampled(max_tokens=128), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    (sampled(min_p=1.1), grpc.StatusCode.INVALID_ARGUMENT, "min_p"),
    (sampled(min_p=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "min_p"),
    (sampled(repetition_penalty=0.0), grpc.StatusCode.INVALID_ARGUMENT, "repetition_penalty"),
    (sampled(repetition_penalty=2.1), grpc.StatusCode.INVALID_ARGUMENT, "repetition_penalty"),
    (sampled(presence_penalty=-2.1), grpc.StatusCode.INVALID_ARGUMENT, "presence_penalty"),
    (sampled(frequency_penalty=2.1), grpc.StatusCode.INVALID_ARGUMENT, "frequency_penalty"),
    (sampled(logit_bias={5: 100.5}), grpc.StatusCode.INVALID_ARGUMENT, "logit_bias[5]"),
    (sampled(logit_bias={300: 1.0}), grpc.StatusCode.INVALID_ARGUMENT, "logit_bias"),
    (
        sampled(logit_bias=dict.fromkeys(range(301), 1.0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "logit_bias",
    ),
    (sampled(stop_token_ids=[300]), grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
    (sampled(stop_token_ids=[5] * 65), grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
    (sampled(min_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT, "min_tokens"),
    (sampled(min_tokens=9, max_tokens=8), grpc.StatusCode.INVALID_ARGUMENT, "min_tokens"),
    (sampled(logprobs=-1), grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
    (sampled(logprobs=21), grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
    (sampled(grammar={}), grpc.StatusCode.INVALID_ARGUMENT, "grammar"),
    (sampled(grammar={"regex": ""}), grpc.StatusCode.INVALID_ARGUMENT, "grammar.regex"),
    (
        sampled(grammar={"json_schema": "{", "field": "mine"}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "mine",
    ),
]


async def test_a_number_is_shown_as_it_was_sent(tmp_path: Path) -> None:
    """The wire made another one of it."""
    bad: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 2.1}, "temperature: 2.1 is not allowed; allowed: 0 to 2"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty: 1e-38 is not allowed"),
        ({"presence_penalty": -3.3}, "presence_penalty: -3.3 is not allowed"),
        ({"logit_bias": {5: 100.1}}, "logit_bias[5]: 100.1 is not allowed"),
    ]
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as c,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(c)
        for fields, shown in bad:
            message = generation_pb2.GenerateRequest(**sampled(**fields))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Generate(message, timeout=5).read()
            assert (error.value.details() or "").startswith(shown)


async def test_bad_requests_name_the_field(tmp_path: Path) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as c,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(c)
        for fields, code, field in BAD:
            call = stub.Generate(generation_pb2.GenerateRequest(**fields), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert error.value.code() is code, fields
            assert (error.value.details() or "").startswith(field), error.value.details()
            assert dict(error.value.trailing_metadata())[FIELD_KEY] == field.encode()
        assert cluster.worker.requests == []


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x12\x02\xff\xfe"])
async def test_bytes_that_are_no_request(tmp_path: Path, raw: bytes) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as c,
    ):
        generate: Any = c.unary_stream(GENERATE)
        call = generate(raw, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "colm.v1.GenerateRequest" in (error.value.details() or "")
        assert dict(error.value.trailing_metadata())[FIELD_KEY] == b"request"
        assert cluster.router.num_running == 0


async def test_set_level_refuses_what_is_not_there(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=0)) as cluster:
        with pytest.raises(InvalidArgument, match="request_id"):
            await cluster.client.set_level("nobody", 1)
        events = cluster.client.generate(token_ids=[5])
        started: Any = await anext(events)
        with pytest.raises(InvalidArgument, match="level: 4"):
            await cluster.client.set_level(started.request_id, 4)
        await events.aclose()


async def test_health_and_reflection(tmp_path: Path) -> None:
    async with (
        scripted_cluster(tmp_path) as cluster,
        connect(cluster.service.grpc_address, None) as c,
    ):
        health: Any = health_pb2_grpc.HealthStub(c)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(c)
        call = stub.ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        response = await call.read()
        names = {service.name for service in response.list_services_response.service}
        assert "colm.v1.GenerationService" in names


async def test_cluster_status(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, num_decode=2) as cluster:
        await cluster.workers[1].stop()
        await cluster.until(lambda: len(cluster.router.view.snapshot().decode) == 1)
        status = await cluster.client.status()
        assert (status.model, status.num_levels, status.membership_version) == (MODEL, 3, 1)
        reachable = {w.worker_id: w.is_reachable for w in status.workers}
        assert reachable == {"d0": True, "d1": False}
        assert status.workers[0].num_free_pages == 64
        assert status.workers[0].num_preemptions == 3
        assert status.workers[0].address == cluster.worker.member.address


async def test_without_a_tokenizer_token_ids_are_served(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, has_tokenizer=False) as cluster:
        events = [e async for e in cluster.client.generate(token_ids=[5, 6], max_tokens=2)]
        assert len(events) == 4
        for options in ({"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
            with pytest.raises(InvalidArgument, match="no tokenizer"):
                await anext(cluster.client.generate(**options))
        with pytest.raises(InvalidArgument, match="stop"):
            await anext(cluster.client.generate(token_ids=[5], stop="x"))


async def test_sla_classes_bound_the_level(tmp_path: Path) -> None:
    sla = {
        "default": SlaClass(),
        "cheap": SlaClass(max_level=2),
        "fast": SlaClass(tpot_ms=15),
    }
    async with scripted_cluster(tmp_path, sla_classes=sla) as cluster:
        levels = []
        for name in ("default", "cheap", "fast"):
            stream = cluster.client.generate(token_ids=[5], max_tokens=1, sla_class=name)
            events: list[Any] = [e async for e in stream]
            levels.append(events[0].level)
        assert levels == [3, 2, 1]
        with pytest.raises(InvalidArgument, match="1 to 2"):
            await anext(cluster.client.generate(token_ids=[5], sla_class="cheap", level=3))


async def test_too_many_at_once(tmp_path: Path) -> None:
    router = RouterConfig(status_interval_s=0.02, max_concurrent=1, max_queued=0)
    script = Script(hold_after=0)
    async with scripted_cluster(tmp_path, script=script, router=router) as cluster:
        first = cluster.client.generate(token_ids=[5])
        await anext(first)
        stub: Any = generation_pb2_grpc.GenerationServiceStub(
            connect(cluster.service.grpc_address, None)
        )
        call = stub.Generate(generation_pb2.GenerateRequest(**text()), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.value.trailing_metadata())["colm-retry-after-ms"]) > 0
        await first.aclose()


def validator() -> Validator:
    return Validator(model_facts(), None, {"default": SlaClass()}, "default")


@pytest.mark.parametrize(
    ("num_prompt", "expected"), [(1, MAX_CONTEXT - 1), (MAX_CONTEXT - 1, 1), (100, 28)]
)
async def test_max_tokens_is_by_default_what_the_context_leaves(
    num_prompt: int, expected: int
) -> None:
    checked = await validator().check(GenerationRequest(TokenPrompt((5,) * num_prompt)))
    assert checked.sampling.max_tokens == min(expected, DEFAULT_MAX_TOKENS)


async def test_seeds_are_drawn_when_not_given() -> None:
    requests = [GenerationRequest(TokenPrompt((5,))) for _ in range(2)]
    first, second = [(await validator().check(r)).sampling.seed for r in requests]
    assert first != second
    given = GenerationRequest(TokenPrompt((5,)), seed=0)
    assert (await validator().check(given)).sampling.seed == 0


async def test_a_request_overrides_the_targets_of_its_class() -> None:
    chat = SlaClass(ttft_ms=200, tpot_ms=20, max_level=2, weight=3, deadline_s=60)
    checks = Validator(model_facts(), None, {"chat": chat}, "chat")
    prompt = TokenPrompt((5,))
    of_class = await checks.check(GenerationRequest(prompt))
    assert (of_class.ttft_s, of_class.tpot_s, of_class.deadline_s) == (0.2, 0.02, 60)
    assert (of_class.max_level, of_class.weight) == (2, 3)
    assert of_class.own_targets == frozenset()
    own = await checks.check(GenerationRequest(prompt, tpot_ms=50, deadline_s=5))
    assert (own.ttft_s, own.tpot_s, own.deadline_s) == (0.2, 0.05, 5)
    assert own.own_targets == {"tpot_ms", "deadline_s"}


async def test_requests_of_a_class_with_less_weight_than_another_yield_to_it() -> None:
    classes = {"chat": SlaClass(tpot_ms=20, weight=2), "text": SlaClass()}
    checks = Validator(model_facts(), None, classes, "chat")
    prompt = TokenPrompt((5,))
    assert (await checks.check(GenerationRequest(prompt))).heavier_tpot_s is None
    text = await checks.check(GenerationRequest(prompt, sla_class="text"))
    assert text.heavier_tpot_s == 0.02


@pytest.mark.parametrize("prompt", [TextPrompt("x"), ChatPrompt(())])
async def test_no_tokenizer_is_said_before_anything_else(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        await validator().check(GenerationRequest(prompt))


async def test_how_a_text_is_read_can_be_chosen(tmp_path: Path) -> None:
    text = "a<|user|>b"
    async with scripted_cluster(tmp_path) as cluster:
        parsed = trained_tokenizer().encode(text).ids
        choices: tuple[Options, ...] = ({}, {"parse_special": True}, {"parse_special": False})
        for options in choices:
            async for _ in cluster.client.generate(text, **options):
                pass
            body = {"prompt": text, "add_special_tokens": True, **options}
            assert (await cluster.http.post("/v1/completions", json=body)).status_code == 200
        prompts = [list(request.prompt) for request in cluster.worker.requests]
        assert prompts[:4] == [parsed] * 4
        assert prompts[4] == prompts[5]
        assert not {0, 1, 2, 3} & set(prompts[4])
        assert trained_tokenizer().decode(prompts[4]) == text
        chat = {"messages": [{"role": "user", "content": text}], "parse_special": True}
        response = await cluster.http.post("/v1/chat/completions", json=chat)
        assert response.json()["error"]["param"] == "parse_special"
