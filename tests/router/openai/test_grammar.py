"""How OpenAI clients ask for constrained output, up to what the decode worker is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_serve.core import SamplingParams
from colm_serve.grammar import Grammar, GrammarKind
from tests.router.cluster import MODEL, scripted_cluster
from tests.router.openai.test_sampling import openai_client
from tests.router.scripted import ScriptedDecode

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
AS_TEXT = json.dumps(SCHEMA, ensure_ascii=False)
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
FORMAT = "response_format"
OUTPUTS = "structured_outputs"

ASKED: list[tuple[dict[str, Any], Grammar | None, str]] = [
    ({FORMAT: {"type": "text"}}, None, ""),
    ({FORMAT: {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT), FORMAT),
    ({FORMAT: NAMED}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT), f"{FORMAT}.json_schema.schema"),
    ({OUTPUTS: {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT), f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json": AS_TEXT}}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT), f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json_object": True}}, Grammar(GrammarKind.JSON_OBJECT), f"{OUTPUTS}.json_object"),
    ({OUTPUTS: {"regex": "a+", "json": None}}, Grammar(GrammarKind.REGEX, "a+"),
     f"{OUTPUTS}.regex"),
    ({OUTPUTS: {"choice": ["a", "b"]}}, Grammar.of_choices(["a", "b"]), f"{OUTPUTS}.choice"),
    ({OUTPUTS: {"grammar": 'root ::= "a"'}}, Grammar(GrammarKind.EBNF, 'root ::= "a"'),
     f"{OUTPUTS}.grammar"),
    ({OUTPUTS: {"regex": "a"}, FORMAT: {"type": "text"}}, Grammar(GrammarKind.REGEX, "a"),
     f"{OUTPUTS}.regex"),
]  # fmt: skip


def asked_of(worker: ScriptedDecode) -> SamplingParams:
    return worker.requests[-1].sampling


async def test_each_way_of_asking_reaches_the_worker(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        for body, expected, field in ASKED:
            await client.completions.create(
                model=MODEL, prompt="x", max_tokens=2, extra_body=body, n=2
            )
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2,
                extra_body=body,
            )  # fmt: skip
            for request in cluster.worker.requests[-3:]:
                assert request.sampling.grammar == expected, body
                if request.sampling.grammar is not None:
                    assert request.sampling.grammar.field == field


async def test_grpc_clients_send_grammars_as_they_are(tmp_path: Path) -> None:
    grammar = Grammar(GrammarKind.REGEX, "a+")
    async with scripted_cluster(tmp_path) as cluster:
        async for _ in cluster.client.generate("x", max_tokens=2, grammar=grammar):
            pass
        assert asked_of(cluster.worker).grammar == grammar


BAD: list[tuple[dict[str, Any], str]] = [
    ({FORMAT: "json_object"}, FORMAT),
    ({FORMAT: {}}, f"{FORMAT}.type"),
    ({FORMAT: {"type": "xml"}}, f"{FORMAT}.type"),
    ({FORMAT: {"type": "json_schema"}}, f"{FORMAT}.json_schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"name": "n"}}}, f"{FORMAT}.json_schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"schema": 5}}}, f"{FORMAT}.json_schema"),
    ({FORMAT: {"type": "json_object"}, OUTPUTS: {"regex": "a"}}, OUTPUTS),
    ({OUTPUTS: {}}, OUTPUTS),
    ({OUTPUTS: {"regex": "a", "json": {}}}, OUTPUTS),
    ({OUTPUTS: {"structural_tag": "x"}}, OUTPUTS),
    ({OUTPUTS: {"regex": "a", "whitespace_pattern": " "}}, OUTPUTS),
    ({OUTPUTS: {"regex": ""}}, f"{OUTPUTS}.regex"),
    ({OUTPUTS: {"regex": 5}}, f"{OUTPUTS}.regex"),
    ({OUTPUTS: {"regex": "a" * 16_385}}, f"{OUTPUTS}.regex"),
    ({OUTPUTS: {"regex": "a\0"}}, f"{OUTPUTS}.regex"),
    ({OUTPUTS: {"grammar": ["a"]}}, f"{OUTPUTS}.grammar"),
    ({OUTPUTS: {"choice": "ab"}}, f"{OUTPUTS}.choice"),
    ({OUTPUTS: {"choice": []}}, f"{OUTPUTS}.choice"),
    ({OUTPUTS: {"choice": ["a", ""]}}, f"{OUTPUTS}.choice"),
    ({OUTPUTS: {"choice": ["a"] * 1_001}}, f"{OUTPUTS}.choice"),
    ({OUTPUTS: {"json": "{"}}, f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json": "5"}}, f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json": {"title": "x" * 65_536}}}, f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json": '{"a":' * 5_000}}, f"{OUTPUTS}.json"),
    ({OUTPUTS: {"json_object": "yes"}}, f"{OUTPUTS}.json_object"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_asked_is_named(
    tmp_path: Path, body: dict[str, Any], field: str
) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for path, prompt in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            response = await cluster.http.post(path, json={**prompt, **body})
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"].startswith(field), error
            assert len(error["message"]) < 600
        assert cluster.worker.requests == []


async def test_a_model_without_a_tokenizer_takes_no_grammar(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, has_tokenizer=False) as cluster:
        body = {"prompt": [5], OUTPUTS: {"regex": "a"}}
        error = (await cluster.http.post("/v1/completions", json=body)).json()["error"]
        assert error["param"] == f"{OUTPUTS}.regex"
        assert "no tokenizer" in error["message"]
