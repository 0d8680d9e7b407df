"""What a client may hold a text to: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from colm_serve.errors import InvalidArgument

MAX_SCHEMA_CHARS = 65_536
#: Few characters of these can mean a large automaton.
MAX_PATTERN_CHARS = 16_384
MAX_CHOICES = 1_000
#: Of an integer in a schema: as many as a float can be of.
MAX_DIGITS = 308
#: Of a pattern with its counted repetitions written out: 2.4 million took 24 GB to compile.
MAX_SYMBOLS = 20_000

_REPETITION = r"\{(\d+)(?:,(\d*))?\}"
# One that is not closed is the rest of the text, so that each character is looked at once.
_CLASS = r"\[(?:\\[\s\S]|[^\]\\])*+(\]|\\?\Z)"
_NUM_REPETITION_GROUPS = 2
_REGEX_SYMBOL = re.compile(rf"{_REPETITION}|\\.|{_CLASS}|.", re.DOTALL)
_EBNF_SYMBOL = re.compile(rf'{_REPETITION}|#[^\r\n]*|"(?:\\[\s\S]|[^"\\])*+("|\\?\Z)|{_CLASS}|\S')


class GrammarKind(Enum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    EBNF = "ebnf"


@dataclass(frozen=True)
class Grammar:
    """The texts that a generation may come to; the whole output is one of them.

    Args:
        text: the schema as JSON, the expression, or EBNF as llama.cpp writes it with a rule
            `root`; empty for JSON_OBJECT.
        field: what errors call it; by default grammar.<kind>.

    Raises:
        InvalidArgument: empty, too long, repeating too much, or a schema that is not JSON.
    """

    kind: GrammarKind
    text: str = ""
    field: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.field:
            object.__setattr__(self, "field", f"grammar.{self.kind.value}")
        if self.kind is GrammarKind.JSON_OBJECT:
            if self.text:
                raise InvalidArgument(self.field, self.text, "no text: any JSON object matches")
            return
        longest = MAX_PATTERN_CHARS
        if self.kind is GrammarKind.JSON_SCHEMA:
            longest = MAX_SCHEMA_CHARS
        if not 1 <= len(self.text) <= longest:
            shown = f"{len(self.text)} characters"
            raise InvalidArgument(self.field, shown, f"1 to {longest} characters")
        self._check_characters()
        if self.kind is GrammarKind.JSON_SCHEMA:
            self._check_schema()
        else:
            self._check_size()

    @classmethod
    def of_choices(cls, choices: Sequence[str], field: str = "") -> Grammar:
        """One of some texts, as it stands; raises InvalidArgument as the constructor does."""
        field = field or "grammar.choice"
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            allowed = f"1 to {MAX_CHOICES} texts, none empty"
            raise InvalidArgument(field, list(choices), allowed)
        return cls(GrammarKind.EBNF, "root ::= " + " | ".join(map(_quoted, choices)), field)

    def _check_characters(self) -> None:
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            allowed = "Unicode text without lone surrogates"
            raise InvalidArgument(self.field, self.text, allowed) from error
        if "\0" in self.text:
            raise InvalidArgument(self.field, self.text, "text without NUL characters")

    def _check_size(self) -> None:
        if num_symbols(self.text, self.kind) > MAX_SYMBOLS:
            allowed = (
                f"at most {MAX_SYMBOLS} symbols, counted repetitions written out, and everything "
                "closed that is opened"
            )
            raise InvalidArgument(self.field, self.text, allowed)

    def _check_schema(self) -> None:
        try:
            schema = json.loads(self.text, parse_int=_short_integer)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(self.field, self.text, f"a schema in JSON ({error})") from error
        if not isinstance(schema, dict | bool):
            raise InvalidArgument(self.field, schema, "a JSON object")


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; allowed: {MAX_DIGITS}")
    return int(digits)


def num_symbols(text: str, kind: GrammarKind) -> int:
    """Symbols of a pattern with its counted repetitions written out, or more."""
    sizes, last = [0], 0  # of the groups that are open, of the last symbol or group in them
    pattern = _EBNF_SYMBOL if kind is GrammarKind.EBNF else _REGEX_SYMBOL
    for match in pattern.finditer(text):
        symbol = match.group()
        if symbol[0] == "#" and kind is GrammarKind.EBNF:
            continue
        closing = match.lastindex or 0
        if closing > _NUM_REPETITION_GROUPS and match[closing] not in ("]", '"'):
            return MAX_SYMBOLS + 1
        if symbol == "(":
            sizes.append(0)
            continue
        if symbol == ")" and len(sizes) > 1:
            last = sizes.pop()
        elif match.group(1) is not None:
            # What is there once already stands for the first time.
            last *= max(1, _repetitions(match.group(2) or match.group(1))) - 1
        else:
            last = len(symbol) if symbol[0] == '"' else 1
        sizes[-1] += last
    return sum(sizes)


def _repetitions(digits: str) -> int:
    """More than is allowed where there are more digits than anybody needs."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 10 else MAX_SYMBOLS + 2


def _quoted(text: str) -> str:
    """A string of the EBNF; what is not printable is written as its code point."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
