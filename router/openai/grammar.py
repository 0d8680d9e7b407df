"""The two ways in which OpenAI clients ask for constrained output: OpenAI's and vLLM's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind

_FORMATS = "an object with a type: text, json_object or json_schema"


def read_grammar(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> Grammar | None:
    """The grammar that a body asks for, None for any text.

    Raises:
        InvalidArgument: malformed, more than one, or of a kind that is not known.
    """
    grammar = None if response_format is None else _of_format(response_format)
    if structured_outputs is None:
        return grammar
    if grammar is not None:
        shown = sorted(structured_outputs)
        raise InvalidArgument("structured_outputs", shown, "none beside a response_format")
    return _of_structured_outputs(structured_outputs)


def _of_format(response_format: Mapping[str, Any]) -> Grammar | None:
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT, field="response_format")
        case "json_schema":
            field = "response_format.json_schema"
            named = response_format.get("json_schema")
            if not isinstance(named, dict) or "schema" not in named:
                raise InvalidArgument(field, named, "an object with a name and a schema")
            return _schema(named["schema"], field + ".schema")
        case other:
            raise InvalidArgument("response_format.type", other, _FORMATS)


def _of_structured_outputs(asked: Mapping[str, Any]) -> Grammar:
    given = {name: value for name, value in asked.items() if value not in (None, False)}
    if len(given) != 1 or not set(given) <= set(_KINDS):
        allowed = "exactly one of " + ", ".join(_KINDS)
        raise InvalidArgument("structured_outputs", sorted(given), allowed)
    [(name, value)] = given.items()
    return _KINDS[name](value, f"structured_outputs.{name}")


def _schema(value: object, field: str) -> Grammar:
    if isinstance(value, str):
        return Grammar(GrammarKind.JSON_SCHEMA, value, field)
    if not isinstance(value, dict | bool):
        raise InvalidArgument(field, value, "a JSON schema")
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value, ensure_ascii=False), field)


def _regex(value: object, field: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, _text(value, field), field)


def _ebnf(value: object, field: str) -> Grammar:
    return Grammar(GrammarKind.EBNF, _text(value, field), field)


def _choice(value: object, field: str) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidArgument(field, value, "a list of strings")
    return Grammar.of_choices(value, field)


def _json_object(value: object, field: str) -> Grammar:
    if value is not True:
        raise InvalidArgument(field, value, "true")
    return Grammar(GrammarKind.JSON_OBJECT, field=field)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(field, value, "a string")
    return value


_KINDS: dict[str, Callable[[object, str], Grammar]] = {
    "json": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _ebnf,
}
