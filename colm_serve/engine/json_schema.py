"""Which JSON schemas a grammar can stand for: what it would leave out is refused by name.

What is left out knowingly: `format`s that are not known, and that only one branch of `oneOf` may
match, which is taken as `anyOf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import MAX_SYMBOLS, GrammarKind, num_symbols

MAX_DEPTH = 64

#: Keywords whose meaning the grammar compiler does not know; it passes over them.
_UNSUPPORTED = {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
    "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
}  # fmt: skip

#: Of these the compiler takes the first that a schema has, and nothing that stands beside it.
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")

#: Keywords that do not constrain a value, beside which the above may stand.
_NOTES = {
    "$defs", "definitions", "$schema", "$id", "$comment", "$anchor", "title", "description",
    "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip

#: Left out without a `type` beside them.
_TYPED = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "pattern", "format",
}  # fmt: skip

#: Left out beside the others.
_NOT_BESIDE = {
    "pattern": {"minLength", "maxLength"},
    "multipleOf": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "minProperties": {"patternProperties", "propertyNames"},
    "maxProperties": {"patternProperties", "propertyNames"},
}

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    "items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems",
    "additionalItems",
)  # fmt: skip

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


def check_schema(schema: object, field: str, depth: int = 1) -> None:
    """Raise InvalidArgument for the first keyword that output could not be held to.

    Well-formedness is left to the compiler.
    """
    if not isinstance(schema, dict):
        return
    if depth > MAX_DEPTH:
        raise InvalidArgument(field, "a schema in a schema", f"{MAX_DEPTH} in one another")
    for keyword in _UNSUPPORTED & set(schema):
        if schema[keyword] is not False:
            raise InvalidArgument(f"{field}.{keyword}", schema[keyword], "none: not supported")
    _check_alone(schema, field)
    _check_values(schema, field)
    _check_combinations(schema, field)
    for path, inner in _inner(schema, field):
        check_schema(inner, path, depth + 1)


def check_patterns(schema: object, field: str) -> None:
    """Raise InvalidArgument unless all patterns together are as small as one alone has to be.

    Counted items, characters and properties are no matter: the compiler does not write them out.
    """
    num_left = MAX_SYMBOLS
    for path, pattern in _patterns(schema, field):
        num_left -= num_symbols(pattern, GrammarKind.REGEX)
        if num_left < 0:
            allowed = (
                f"at most {MAX_SYMBOLS} symbols in all patterns, counted repetitions written out"
            )
            raise InvalidArgument(path, pattern, allowed)


def _patterns(schema: object, field: str) -> Iterator[tuple[str, str]]:
    if not isinstance(schema, dict):
        return
    if isinstance(pattern := schema.get("pattern"), str):
        yield f"{field}.pattern", pattern
    if isinstance(named := schema.get("patternProperties"), dict):
        yield from ((f"{field}.patternProperties", pattern) for pattern in named)
    for path, inner in _inner(schema, field):
        yield from _patterns(inner, path)


def _check_alone(schema: Mapping[str, Any], field: str) -> None:
    found = [keyword for keyword in _ALONE if keyword in schema]
    if not found:
        return
    beside = set(schema) - {found[0]} - _NOTES
    if found[0] in ("const", "enum"):
        beside.discard("type")
    if beside:
        allowed = f"without {', '.join(sorted(beside))} beside it"
        raise InvalidArgument(f"{field}.{found[0]}", schema[found[0]], allowed)
    if found[0] == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
        raise InvalidArgument(f"{field}.allOf", schema["allOf"], "one schema")
    if found[0] == "$ref" and not str(schema["$ref"]).startswith("#"):
        raise InvalidArgument(f"{field}.$ref", schema["$ref"], "a part of this schema: #…")


def _check_combinations(schema: Mapping[str, Any], field: str) -> None:
    for keyword in sorted(_TYPED & set(schema)):
        if "type" not in schema:
            raise InvalidArgument(f"{field}.{keyword}", schema[keyword], "none without a type")
    for keyword, others in _NOT_BESIDE.items():
        if keyword in schema and (beside := others & set(schema)):
            allowed = f"without {', '.join(sorted(beside))} beside it"
            raise InvalidArgument(f"{field}.{keyword}", schema[keyword], allowed)
    if "multipleOf" in schema and schema["type"] != "integer":
        raise InvalidArgument(f"{field}.multipleOf", schema["multipleOf"], "type integer only")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            if name not in properties:
                raise InvalidArgument(f"{field}.required", name, "names of properties")


def _check_values(schema: Mapping[str, Any], field: str) -> None:
    """`type` beside const or enum has to agree with each of the values."""
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list):
        return
    values = schema.get("enum", [])
    if "const" in schema:
        values = [schema["const"]]
    for value in values if isinstance(values, list) else ():
        if not any(_is_of_type(value, name) for name in types):
            raise InvalidArgument(f"{field}.type", schema["type"], f"the type of {value!r}")


def _is_of_type(value: object, name: object) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(str(name), ()))


def _inner(schema: Mapping[str, Any], field: str) -> Iterator[tuple[str, object]]:
    for keyword in _SCHEMA_MAPS:
        if isinstance(parts := schema.get(keyword), dict):
            yield from ((f"{field}.{keyword}.{name}", part) for name, part in parts.items())
    for keyword in _SCHEMA_LISTS:
        if isinstance(parts := schema.get(keyword), list):
            yield from ((f"{field}.{keyword}[{i}]", part) for i, part in enumerate(parts))
    for keyword in _SCHEMAS:
        if keyword in schema:
            yield f"{field}.{keyword}", schema[keyword]
    if isinstance(names := schema.get("propertyNames"), dict):
        yield f"{field}.propertyNames", {"type": "string", **names}
