"""Constrained output from an OpenAI client to the bundled model and back."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from tests.system.served import BUNDLED, served

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "arguments": {
            "type": "array",
            "items": {"$ref": "#/$defs/argument"},
            "minItems": 1,
            "maxItems": 2,
        },
        "is_async": {"type": "boolean"},
    },
    "required": ["name", "arguments", "is_async"],
    "$defs": {"argument": {"enum": ["self", "name", "value", "é"]}},
}
NAMED: Any = {"type": "json_schema", "json_schema": {"name": "function", "schema": SCHEMA}}
ASKED: dict[str, Any] = {"model": BUNDLED.name, "max_tokens": 200}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_answers_match_at_every_level(temperature: float) -> None:
    async with served() as client:
        for level in (1, 2, 3, 4):
            asked = {**ASKED, "temperature": temperature, "seed": level}
            reply = await client.chat.completions.create(
                **asked, messages=[{"role": "user", "content": "Describe a function"}],
                n=3, response_format=NAMED, extra_body={"level": level},
            )  # fmt: skip
            for choice in reply.choices:
                assert choice.finish_reason == "stop"
                jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
            texts = await asyncio.gather(
                text(client, level, {"regex": r"def [a-z]{1,9}\(self\):"}, asked),
                text(client, level, {"choice": ["yes", "no", 'may"be']}, asked),
                text(client, level, {"grammar": 'root ::= "[" [0-9]{1,3} "]"'}, asked),
            )
            assert re.fullmatch(r"def [a-z]{1,9}\(self\):", texts[0])
            assert texts[1] in ("yes", "no", 'may"be')
            assert re.fullmatch(r"\[[0-9]{1,3}\]", texts[2])


async def text(
    client: openai.AsyncOpenAI, level: int, outputs: dict[str, Any], asked: dict[str, Any]
) -> str:
    """The text of a streamed completion."""
    stream = await client.completions.create(
        **asked, prompt="def add(", stream=True,
        extra_body={"level": level, "structured_outputs": outputs},
    )  # fmt: skip
    return "".join([part.choices[0].text async for part in stream])


async def test_the_impossible_is_a_400_and_changes_nothing_for_others() -> None:
    plain = {**ASKED, "prompt": "def add(", "seed": 5, "temperature": 1.0}
    async with served() as client:
        alone = await client.completions.create(**plain)
        running = asyncio.create_task(client.completions.create(**plain))
        for field, body in (
            ("structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
            ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= a"}}),
            ("response_format.json_schema", {"response_format": {
                **NAMED, "json_schema": {"name": "n", "schema": {"type": "text"}}}}),
            ("response_format.json_schema.schema.not", {"response_format": {
                **NAMED, "json_schema": {"name": "n", "schema": {"not": {}}}}}),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(**plain, extra_body=body)
            assert caught.value.param is not None
            assert caught.value.param.startswith(field)
        assert (await running).choices[0].text == alone.choices[0].text
