"""A short pattern may stand for a long one; how long it is before it is compiled."""

from __future__ import annotations

import pytest

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import MAX_SYMBOLS, Grammar, GrammarKind, num_symbols


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("abc", 3),
        ("[a-z(]", 1),
        (r"\((a|b)\)", 5),
        ("a{5}", 5),
        ("a{2,5}b", 6),
        ("a{0}", 1),
        ("(ab){3}c", 7),
        ("((a{10}){10}){10}", 1000),
        (")a", 2),
        ("a{" + "0" * 5000 + "5}", 5),
    ],
)
def test_repetitions_are_counted(pattern: str, expected: int) -> None:
    assert num_symbols(pattern, GrammarKind.REGEX) == expected


def test_in_a_grammar_a_string_is_its_characters_whatever_they_are() -> None:
    # root, ::= and two strings of 5 characters with their quotes, one of them three times.
    text = 'root ::= "(((((" "a{9}b"{3}'
    assert num_symbols(text, GrammarKind.EBNF) == 7 + 7 + 3 * 7


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.REGEX, "|".join(f"([a-z]{{1,127}}{i}){{1,127}}" for i in range(150))),
        (GrammarKind.REGEX, "a{999999999}"),
        (GrammarKind.REGEX, "a{" + "9" * 5000 + "}"),
        (GrammarKind.EBNF, 'root ::= ("a" [b-z]{1,200}){1,200}'),
    ],
)
def test_patterns_that_would_take_all_memory_are_refused(kind: GrammarKind, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"at most {MAX_SYMBOLS} symbols"):
        Grammar(kind, text, "structured_outputs.regex")


@pytest.mark.parametrize(
    "text", ["a{" + "9" * 5_000 + "}", "a{1," + "9" * 5_000 + "}", "[" * 9_000, "[" * 8_000 + "\\"]
)
@pytest.mark.parametrize("kind", [GrammarKind.REGEX, GrammarKind.EBNF])
def test_what_cannot_be_counted_is_refused(kind: GrammarKind, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"at most {MAX_SYMBOLS} symbols"):
        Grammar(kind, text)


def test_comments_of_a_grammar_are_no_symbols() -> None:
    assert num_symbols("root ::= a # it's \"[\na ::= b", GrammarKind.EBNF) == 8 + 5


def test_integers_in_schemas_have_the_digits_of_floats() -> None:
    Grammar(GrammarKind.JSON_SCHEMA, '{"maximum": 1' + "0" * 307 + "}")
    with pytest.raises(InvalidArgument, match="an integer of 309 digits; allowed: 308"):
        Grammar(GrammarKind.JSON_SCHEMA, '{"maximum": 1' + "0" * 308 + "}")
