"""Grammars tried in a box: the same verdicts as without, within limits, and nothing broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from colm_serve.box import Box
from colm_serve.engine import grammar_backend
from colm_serve.engine.grammar_backend import GrammarBackend
from colm_serve.engine.grammar_box import GrammarBox, TooSlow
from colm_serve.errors import InvalidArgument, WorkerFailed
from colm_serve.grammar import MAX_SYMBOLS, Grammar, GrammarKind
from tests.router.cluster import save_tokenizer
from tests.router.scripted import VOCAB_SIZE

SMALL = Grammar(GrammarKind.REGEX, "[a-z]{1,9}")
#: Few symbols when counted as a regular expression's are, and minutes of work in a schema.
DEAR_PATTERN = "^" + "x" * 249 + "[a-z]{1,9000}[0-9]{1,9000}$"


def schema(**keywords: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(keywords))


def properties(number: int) -> dict[str, Any]:
    return {f"p{index}": {"type": "integer"} for index in range(number)}


DEAR = schema(type="string", pattern=DEAR_PATTERN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def box(folder: Path) -> Iterator[GrammarBox]:
    box = GrammarBox(folder, VOCAB_SIZE, cpu_s=2.0)
    yield box
    box.close()


def test_its_verdicts_are_those_of_the_backend(box: GrammarBox, folder: Path) -> None:
    backend = GrammarBackend.load(folder, VOCAB_SIZE)
    assert backend is not None
    box.check(SMALL)
    for grammar in (
        Grammar(GrammarKind.REGEX, "(", "what the client called it"),
        Grammar(GrammarKind.EBNF, 'root ::= root "é"'),
        schema(**{"items": {"not": {"const": None}}}),
        schema(const=[[1e400, "\ud83d"]], type="string"),
    ):
        with pytest.raises(InvalidArgument) as here:
            backend.check(grammar)
        with pytest.raises(InvalidArgument) as there:
            box.check(grammar)
        assert str(there.value) == str(here.value)


def test_what_takes_too_long_is_ended_and_costs_the_next_nothing(box: GrammarBox) -> None:
    box.check(SMALL)
    [process] = (p for p in psutil.Process().children() if "grammar_box" in " ".join(p.cmdline()))
    assert len(DEAR_PATTERN) == 277
    with pytest.raises(TooSlow):
        box.check(DEAR)
    box.check(SMALL)
    assert process.is_running()
    assert not process.children()


@pytest.mark.parametrize("end", ["eat", "crash", "raise"])
def test_what_cannot_be_compiled_is_refused_and_breaks_nothing(end: str) -> None:
    with Box("tests.boxed.grammars", memory_bytes=2**28) as box:
        box.start()
        pid = box.pid
        verdict = json.loads(box.call(end.encode(), cpu_s=60, timeout_s=60))
        assert verdict == ["grammar.regex", end, "a grammar that compiles in 256 MiB"]
        assert json.loads(box.call(b"a", cpu_s=60, timeout_s=60)) == "passed"
        assert box.pid == pid


@pytest.mark.parametrize(
    "keywords",
    [
        {"properties": properties(40), "maxProperties": 20},
        {"properties": properties(700), "required": list(properties(700))},
        {"properties": properties(700)},
        {"properties": {f"p{i}": {} for i in range(5000)}},
    ],
)
def test_what_is_looked_at_for_a_text_stays_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]
) -> None:
    """The rules as they are read, not as they are compiled: those of 700 make 245 MB of JSON."""
    lengths: list[int] = []

    class LookedAt(Exception):
        pass

    def look(serialized: str) -> bool:
        lengths.append(len(serialized))
        raise LookedAt

    monkeypatch.setattr(grammar_backend, "is_empty", look)
    backend = GrammarBackend.load(folder, VOCAB_SIZE)
    assert backend is not None
    grammar = schema(type="object", **keywords)
    with pytest.raises(LookedAt):
        backend.check(grammar)
    assert lengths[0] < 2**21


@pytest.mark.parametrize(
    "keywords",
    [
        {"type": "string", "pattern": "([a-z]{1,200}x){1,200}"},
        {"properties": {"a": {"items": {"type": "string", "pattern": "a{15000}|b{15000}"}}}},
        {"patternProperties": {"a{11000}": {}, "b{11000}": {}}},
        {"propertyNames": {"pattern": "a{30000}"}},
        {"$defs": {"a": {"type": "string", "pattern": "(a{200}){200}"}}, "$ref": "#/$defs/a"},
    ],
)
def test_patterns_in_a_schema_are_as_small_as_one_alone(
    box: GrammarBox, keywords: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument, match=f"at most {MAX_SYMBOLS} symbols") as caught:
        box.check(schema(**keywords))
    assert caught.value.field.lower().endswith(("pattern", "patternproperties"))


def test_a_box_that_cannot_work_is_the_workers_failure(tmp_path: Path) -> None:
    box = GrammarBox(tmp_path, VOCAB_SIZE, cpu_s=2.0)
    with pytest.raises(WorkerFailed, match="cannot be compiled here"):
        box.check(SMALL)
    box.close()
    with pytest.raises(WorkerFailed, match="closed"):
        box.check(SMALL)
