"""Grammars over a real tokenizer: all that they allow matches, at any length they may be left."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.engine.grammar import GrammarState
from colm_serve.engine.grammar_backend import GrammarBackend
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.model.vocabulary import load_tokenizer, text_vocabulary
from tests.helpers import TINY, sample_all
from tests.router.cluster import save_tokenizer, trained_tokenizer
from tests.router.scripted import END_OF_TEXT, VOCAB_SIZE

#: More than the tokenizer has, as models have whose vocabulary is padded.
MODEL = replace(TINY, vocab_size=VOCAB_SIZE + 11, eos_token_ids=(END_OF_TEXT,))
SYSTEM = 1  # <|system|>, a special token
PROMPT = 50
Compile = Callable[..., CompiledGrammar]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def compile_(folder: Path) -> Compile:
    compiler = GrammarCompiler(folder, MODEL)
    backend = GrammarBackend.load(folder, MODEL.vocab_size)
    assert backend is not None

    def compile_one(kind: str, text: str = "", **fields: Any) -> CompiledGrammar:
        grammar = Grammar(GrammarKind(kind), text)
        backend.check(grammar)
        compiled = compiler.compile(SamplingParams(99, grammar=grammar, **fields))
        assert compiled is not None
        return compiled

    return compile_one


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> list[bytes]:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return text_vocabulary(tokenizer, MODEL.vocab_size)


def ids(text: str) -> list[int]:
    return list(trained_tokenizer().encode(text).ids)


def allowed(state: GrammarState, drafts: tuple[int, ...] = ()) -> list[int]:
    return [int(i) for i in state.allowed(drafts).nonzero()]


def walk(compiled: CompiledGrammar, vocabulary: list[bytes], seed: int) -> bytes | None:
    """A text of tokens drawn from those allowed; None when it has come to no end by then."""
    draw = random.Random(seed)
    tokens = [PROMPT]
    state = GrammarState(compiled, tokens, 1)
    for num_tokens in range(300):
        choices = allowed(state)
        assert choices
        if END_OF_TEXT in choices and (len(choices) == 1 or draw.random() < 0.2 + num_tokens / 99):
            tokens.append(END_OF_TEXT)
            assert state.failure is None
            return b"".join(vocabulary[token] for token in tokens[1:])
        choices = [token for token in choices if token != END_OF_TEXT]
        closing = [token for token in choices if vocabulary[token] in (b'"', b"}", b"]", b",")]
        tokens.append(draw.choice(closing if closing and draw.random() < 0.7 else choices))
    return None


SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "integer", "multipleOf": 5},
    {"type": "integer", "minimum": 3, "maximum": 17},
    {"type": "number", "exclusiveMaximum": 3.5},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
    {"enum": ["a", 1, None, {"b": [1.5]}]},
    {"const": "x", "type": "string"},
    {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "minProperties": 1},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
    {"type": "object", "propertyNames": {"pattern": "^[ab]$"}},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/name"}], "$defs": {"name": {"const": "é"}}},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
        "$ref": "#/$defs/node",
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_values_match_their_schema(compile_: Compile, vocabulary: list[bytes], schema: Any) -> None:
    compiled = compile_("json_schema", json.dumps(schema))
    texts = [text for seed in range(20) if (text := walk(compiled, vocabulary, seed)) is not None]
    assert len(texts) > 10
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


def test_any_object(compile_: Compile, vocabulary: list[bytes]) -> None:
    texts = [walk(compile_("json_object"), vocabulary, seed) for seed in range(20)]
    values = [json.loads(text) for text in texts if text is not None]
    assert len(values) > 10
    assert all(isinstance(value, dict) for value in values)
    assert any(values), "nothing but empty ones"


@pytest.mark.parametrize("pattern", ["ab+", "(yes|no)!?", r"\d{4}-\d{2}", "[α-ω]{2,9}", "a*"])
def test_texts_match_their_expression(
    compile_: Compile, vocabulary: list[bytes], pattern: str
) -> None:
    for seed in range(20):
        text = walk(compile_("regex", pattern), vocabulary, seed)
        assert text is not None
        assert re.fullmatch(pattern, text.decode("utf-8")), text


def test_texts_match_their_ebnf(compile_: Compile, vocabulary: list[bytes]) -> None:
    balanced = 'root ::= "(" inner ")"\ninner ::= [a-z]{1,3} | root | root "+" inner'
    texts = {walk(compile_("ebnf", balanced), vocabulary, seed) for seed in range(30)}
    assert len(texts) > 3
    for text in texts - {None}:
        assert text is not None
        flat = text.decode()
        for _ in range(len(flat)):
            flat = re.sub(r"\((X\+)*(X|[a-z]{1,3})\)", "X", flat)
        assert flat == "X", text


@pytest.mark.parametrize(
    "text",
    ['root ::= "a" root | ""', 'root ::= x{0,3} "b"\nx ::= x', 'root ::= x*\nx ::= "b" x'],
)
def test_a_rule_without_a_text_may_be_left_out(compile_: Compile, text: str) -> None:
    assert allowed(GrammarState(compile_("ebnf", text), [PROMPT], 1))


def test_choices_stand_as_they_are(compile_: Compile, vocabulary: list[bytes]) -> None:
    choices = ['a"b', "c\\d", "é\n", "🙂", "x\x7f", "\u2028", "root ::="]
    compiled = compile_("ebnf", Grammar.of_choices(choices).text)
    texts = {walk(compiled, vocabulary, seed) for seed in range(200)}
    assert texts == {choice.encode() for choice in choices}


def test_special_tokens_and_those_without_text_never_come(compile_: Compile) -> None:
    state = GrammarState(compile_("regex", r"[\s\S]*"), [PROMPT], 1)
    without_text = {SYSTEM, 2, 3, *range(VOCAB_SIZE, MODEL.vocab_size)}
    assert not without_text & set(allowed(state))
    assert {END_OF_TEXT, *ids("def add(é🙂")[:4]} <= set(allowed(state))


REFUSED: list[tuple[str, str, str]] = [
    ("regex", "(", "grammar.regex"),
    ("regex", "a(?=b)", "grammar.regex"),
    ("regex", r"[^\s\S]", "grammar.regex"),
    ("ebnf", 'root ::= "a', "grammar.ebnf"),
    ("ebnf", 'start ::= "a"', "grammar.ebnf"),
    ("ebnf", "root ::= other", "grammar.ebnf"),
    ("ebnf", 'root ::= root "a"', "grammar.ebnf"),
    ("ebnf", 'root ::= "a" root', "grammar.ebnf"),
    ("ebnf", 'root ::= "a" x{2,3} | y\nx ::= "b" x\ny ::= [a-z] y y', "grammar.ebnf"),
    ("json_schema", "false", "grammar.json_schema"),
    ("json_schema", '{"type": "text"}', "grammar.json_schema"),
    ("json_schema", '{"enum": []}', "grammar.json_schema"),
    ("json_schema", '{"$ref": "#/$defs/a"}', "grammar.json_schema"),
    ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "grammar"),
    ("json_schema", '{"properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "grammar"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "grammar.json_schema"),
    ("json_schema", '{"items": ' * 65 + "{}" + "}" * 65, "grammar.json_schema.items.items"),
    ("json_schema", '{"const": ' + "[" * 600 + "]" * 600 + "}", "grammar.json_schema"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "grammar.json_schema.uniqueItems"),
    ("json_schema", '{"items": {"not": {}}}', "grammar.json_schema.items.not"),
    ("json_schema", '{"allOf": [{"type": "null"}, {}]}', "grammar.json_schema.allOf"),
    ("json_schema", '{"$ref": "#", "minimum": 1}', "grammar.json_schema.$ref"),
    ("json_schema", '{"$ref": "https://example.org/s"}', "grammar.json_schema.$ref"),
    ("json_schema", '{"properties": {"a": {"minimum": 1}}}', "grammar.json_schema.properties.a"),
    ("json_schema", '{"type": "object", "required": ["b"]}', "grammar.json_schema.required"),
    ("json_schema", '{"enum": [1, "a"], "type": "integer"}', "grammar.json_schema.type"),
    ("json_schema", '{"type": "number", "multipleOf": 2}', "grammar.json_schema.multipleOf"),
    ("json_schema", '{"type": "string", "pattern": "a", "maxLength": 1}', "grammar.json_schema."),
]


@pytest.mark.parametrize(("kind", "text", "field"), REFUSED)
def test_what_cannot_be_followed_is_refused(
    compile_: Compile, kind: str, text: str, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        compile_(kind, text)
    assert caught.value.field.startswith(field), caught.value
    assert "/project/" not in str(caught.value)


def test_a_model_needs_a_tokenizer_and_an_end(folder: Path, tmp_path: Path) -> None:
    asked = SamplingParams(9, grammar=Grammar(GrammarKind.REGEX, "a"))
    endless = replace(MODEL, eos_token_ids=())
    for compiler in (
        GrammarCompiler(tmp_path, MODEL),
        GrammarCompiler(None, MODEL),
        GrammarCompiler(folder, endless),
    ):
        with pytest.raises(InvalidArgument, match=r"grammar\.regex"):
            compiler.compile(asked)
        assert compiler.compile(SamplingParams(9)) is None
    compiled = GrammarCompiler(folder, endless).compile(replace(asked, stop_token_ids=(SYSTEM,)))
    assert compiled is not None
    assert compiled.stop_token_ids == (SYSTEM,)


def test_drafts_are_followed_but_not_kept(compile_: Compile) -> None:
    compiled = compile_("json_object")
    text = ids('{"a": [1, "b"]}')
    tokens = [PROMPT, text[0]]
    state = GrammarState(compiled, tokens, 1)
    before = allowed(state)
    for num_drafts in range(len(text)):
        grown = GrammarState(compiled, [PROMPT, *text[: 1 + num_drafts]], 1)
        assert allowed(state, tuple(text[1 : 1 + num_drafts])) == allowed(grown)
        assert allowed(state) == before
    ended = (*text[1:], END_OF_TEXT)
    assert END_OF_TEXT in allowed(state, ended[:-1])
    assert allowed(state, ended) == [END_OF_TEXT]
    wrong = ids("]")[0]
    assert allowed(state, (text[1], wrong, text[2])) == allowed(state, (text[1],))
    assert state.failure is None
    tokens += text[1:]
    assert allowed(state) == allowed(GrammarState(compiled, tokens, 1))


def test_output_of_another_worker_is_followed_first(compile_: Compile) -> None:
    compiled = compile_("regex", "abc+")
    state = GrammarState(compiled, [*ids("xyz"), *ids("ab")], len(ids("xyz")))
    assert allowed(state) == allowed(GrammarState(compiled, [PROMPT, *ids("ab")], 1))
    assert ids("c")[0] in allowed(state)
    foreign = GrammarState(compiled, [PROMPT, *ids("xy")], 1)
    assert allowed(foreign) == [END_OF_TEXT]
    assert foreign.failure is not None


def test_a_dead_end_ends_the_text_and_is_told(compile_: Compile) -> None:
    tokens = [PROMPT]
    state = GrammarState(compile_("regex", r"a[^\s\S]"), tokens, 1)
    assert allowed(state) == ids("a")
    tokens += ids("a")
    assert allowed(state) == [END_OF_TEXT]
    tokens.append(END_OF_TEXT)
    failure = state.failure
    assert failure is not None
    assert "dead end" in str(failure)


class FakeClock:
    """So much processor time for each call that is timed; a list of what is to come at first."""

    def __init__(self, default_s: float, *first_s: float) -> None:
        self._now_s = 0.0
        self._is_begin = True
        self._default_s = default_s
        self._first_s = list(first_s)

    def __call__(self) -> float:
        if not self._is_begin:
            self._now_s += self._first_s.pop(0) if self._first_s else self._default_s
        self._is_begin = not self._is_begin
        return self._now_s


@pytest.mark.parametrize(
    ("clock", "num_tokens", "told"),
    [
        (FakeClock(0.0, 0.3), 0, "one token took 0.30 s"),  # the first mask
        (FakeClock(0.0, 0.0, 0.3), 1, "one token took 0.30 s"),  # what follows a token
        (FakeClock(0.0, 0.0, 0.15, 0.15), 1, "one token took 0.30 s"),  # that and the mask after
        (FakeClock(0.1), 11, "11 tokens took 2.30 s"),
    ],
)
def test_a_text_is_given_up_when_following_it_takes_too_long(
    compile_: Compile, clock: FakeClock, num_tokens: int, told: str
) -> None:
    tokens = [PROMPT]
    state = GrammarState(compile_("ebnf", 'root ::= root root | "a"'), tokens, 1, clock)
    for _ in range(num_tokens):
        state.prepare()
        assert state.failure is None
        assert allowed(state) == ids("a") or END_OF_TEXT in allowed(state)
        tokens += ids("a")
    state.prepare()
    assert state.failure is not None
    assert state.failure.field == "grammar.ebnf"
    assert "a less ambiguous grammar" in str(state.failure)
    assert told in str(state.failure)
    assert not state.can_follow(())
    assert allowed(state) == [END_OF_TEXT]


def test_what_is_drafted_is_no_reason_to_give_a_text_up(compile_: Compile) -> None:
    tokens, [a] = [PROMPT], ids("a")
    clock = FakeClock(0.0, 0.0, 1.0)
    state = GrammarState(compile_("ebnf", 'root ::= root root | "a"'), tokens, 1, clock)
    assert state.is_cheap
    assert state.can_follow((a,))
    assert not state.is_cheap
    assert state.can_follow((a,)), "it is known now"
    assert not state.can_follow((a, a)), "it might take as long"
    tokens.append(a)
    state.prepare()
    assert state.failure is None
    assert state.is_cheap


def test_drafts_are_not_followed_into_a_dead_end(compile_: Compile) -> None:
    state = GrammarState(compile_("regex", r"a(b|c[^\s\S])"), [PROMPT], 1)
    assert state.can_follow((*ids("a"), *ids("b")))
    assert not state.can_follow((*ids("a"), *ids("c")))
    assert state.failure is None


def processor(compiled: CompiledGrammar, tokens: list[int], **fields: Any) -> LogitsProcessor:
    sampling = SamplingParams(20, grammar=compiled.grammar, **fields)
    request = DecodeRequest("r", (PROMPT,), 1, sampling, (), "")
    made = LogitsProcessor.make(request, tokens, MODEL.eos_token_ids, compiled)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("fields", "text", "end"),
    [
        ({}, "", False),
        ({}, "a", True),
        ({}, "aa", True),
        ({"min_tokens": 5}, "a", False),
        ({"min_tokens": 5}, "aa", True),  # the grammar has nothing else
        ({"ignore_eos": True}, "a", True),
        ({"min_tokens": 5, "ignore_eos": True}, "a", False),
        ({"logit_bias": ((END_OF_TEXT, 100.0),)}, "", False),
    ],
)
def test_the_end_is_the_grammars(
    compile_: Compile, fields: dict[str, Any], text: str, end: bool
) -> None:
    tokens = [PROMPT] + ids("a") * len(text)
    logits = torch.zeros(MODEL.vocab_size)
    scores = processor(compile_("regex", "a{1,2}"), tokens, **fields).process(logits)
    assert (scores[END_OF_TEXT] > -torch.inf) == end
    assert (scores[ids("a")[0]] > -torch.inf) == (len(text) < 2)
    assert int((scores > -torch.inf).sum()) == end + (len(text) < 2)
    assert not logits.any()


def scores(position: int) -> torch.Tensor:
    """A model's scores that depend on nothing but the position."""
    generator = torch.Generator().manual_seed(position)
    return torch.randn(MODEL.vocab_size, generator=generator) * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_right", [0, 2, 5])
def test_drafts_do_not_change_the_text(
    compile_: Compile, temperature: float, num_right: int
) -> None:
    """Drafts run past what is right, past what the grammar allows, and past its end."""
    compiled = compile_("json_schema", '{"type": "string", "minLength": 9, "maxLength": 20}')
    asked: dict[str, Any] = {"temperature": temperature, "presence_penalty": 1.0, "min_tokens": 3}
    sampling = SamplingParams(99, grammar=compiled.grammar, **asked)

    def text(drafts_after: Callable[[int], tuple[int, ...]]) -> list[int]:
        tokens = [PROMPT]
        rules = processor(compiled, tokens, **asked)
        while tokens[-1] != END_OF_TEXT:
            drafts = drafts_after(len(tokens))
            rows = [scores(len(tokens) + i) for i in range(1 + len(drafts))]
            [got] = sample_all(torch.stack(rows), [Run(sampling, len(tokens), rules, drafts)])
            has_end = END_OF_TEXT in got.tokens
            tokens += got.tokens[: got.tokens.index(END_OF_TEXT) + 1] if has_end else got.tokens
        assert rules.grammar is not None
        assert rules.grammar.failure is None
        return tokens

    plain = text(lambda _: ())
    wrong = (SYSTEM, *ids("}"), END_OF_TEXT)
    assert text(lambda start: (*plain[start : start + num_right], *wrong)) == plain
    assert len(plain) > 5


def test_stop_tokens_are_text_as_far_as_they_have_some(compile_: Compile) -> None:
    asked: dict[str, Any] = {"stop_token_ids": (SYSTEM, *ids("b"))}
    compiled = compile_("regex", "ab{0,2}", **asked)
    logits = torch.zeros(MODEL.vocab_size)
    scores = processor(compiled, [PROMPT], **asked).process(logits)
    assert [int(i) for i in (scores > -torch.inf).nonzero()] == ids("a")
    scores = processor(compiled, [PROMPT, *ids("a")], **asked).process(logits)
    expected = sorted({END_OF_TEXT, SYSTEM, *ids("b")} | set(ids("bb")))
    assert [int(i) for i in (scores > -torch.inf).nonzero()] == expected


def test_the_library_is_not_loaded_before_it_is_needed() -> None:
    code = "import colm_serve.decode_worker.service, sys; sys.exit('xgrammar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
