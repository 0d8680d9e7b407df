"""The grammar library, with one model's vocabulary taken in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from colm_serve.engine.empty_grammar import is_empty
from colm_serve.engine.json_schema import check_patterns, check_schema
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.model.vocabulary import load_tokenizer, text_vocabulary

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 256 * 2**20
#: The library recurses on the caller's stack, which a schema nested deeper would overrun.
_MAX_NESTING = 500
#: No JSON in one line has these.
_CONTROL = re.compile(rb"[\x00-\x1f]")

#: Time, file and condition, which the library puts before what it says.
_LOCATION = re.compile(r"^.*\[[\d:]+\] \S+:\d+: (Check failed: .*? is false: )?")

_NAMES = {
    GrammarKind.JSON_OBJECT: "a JSON object",
    GrammarKind.JSON_SCHEMA: "a JSON schema that some value matches",
    GrammarKind.REGEX: "a regular expression",
    GrammarKind.EBNF: "a grammar in EBNF",
}


class GrammarBackend:
    """Compiles without bounds: what has not been compiled in a box before may take hours."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        self.library = _import_library()
        self._vocabulary = vocabulary
        self.library.set_max_recursion_depth(_MAX_NESTING)
        self._of_text = self._make(vocabulary)
        # The library's strings of bounded length have control characters as they are.
        self._of_json = self._make([b"" if _CONTROL.search(text) else text for text in vocabulary])

    @classmethod
    def load(cls, folder: Path | None, vocab_size: int) -> GrammarBackend | None:
        """For the tokenizer of a model folder, None without one; CheckpointError if damaged."""
        tokenizer = None if folder is None else load_tokenizer(folder)
        return None if tokenizer is None else cls(text_vocabulary(tokenizer, vocab_size))

    def _make(self, vocabulary: list[bytes]) -> xgrammar.GrammarCompiler:
        # A token without text is one that no grammar allows.
        info = self.library.TokenizerInfo(vocabulary, stop_token_ids=[])
        compiler: xgrammar.GrammarCompiler = self.library.GrammarCompiler(
            info, max_threads=1, cache_limit_bytes=CACHE_BYTES // 2
        )
        return compiler

    def is_special(self, token_id: int) -> bool:
        """Whether a token adds nothing to a text."""
        return not self._vocabulary[token_id]

    def check(self, grammar: Grammar) -> None:
        """Raise InvalidArgument for one that is malformed, not supported, or no text matches.

        A text counts only if this model has a token that it can begin with.
        """
        rules = self._read(grammar)
        # Not of the compiled grammar, which is hundreds of times as long when written out.
        if is_empty(rules.serialize_json()) or not self._can_begin(self.compile(grammar)):
            raise InvalidArgument(grammar.field, grammar.text, "a grammar that some text matches")

    def compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        """A grammar that `check` passes, ready for use; without the interpreter's lock."""
        with _translated(grammar):
            match grammar.kind:
                case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
                    schema, is_strict = _schema_of(grammar)
                    return self._of_json.compile_json_schema(
                        schema, any_whitespace=False, strict_mode=is_strict
                    )
                case GrammarKind.REGEX:
                    return self._of_text.compile_regex(grammar.text)
                case GrammarKind.EBNF:
                    return self._of_text.compile_grammar(grammar.text)

    def _read(self, grammar: Grammar) -> xgrammar.Grammar:
        rules: type[xgrammar.Grammar] = self.library.Grammar
        with _translated(grammar):
            match grammar.kind:
                case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
                    schema, is_strict = _schema_of(grammar)
                    check_schema(json.loads(schema), grammar.field)
                    check_patterns(json.loads(schema), grammar.field)
                    return rules.from_json_schema(
                        schema, any_whitespace=False, strict_mode=is_strict
                    )
                case GrammarKind.REGEX:
                    return rules.from_regex(grammar.text)
                case GrammarKind.EBNF:
                    return rules.from_ebnf(grammar.text)

    def _can_begin(self, compiled: xgrammar.CompiledGrammar) -> bool:
        matcher = self.library.GrammarMatcher(compiled)
        mask = self.library.allocate_token_bitmask(1, len(self._vocabulary))
        is_limited = matcher.fill_next_token_bitmask(mask)
        return matcher.is_completed() or not is_limited or bool(mask.any())


def _schema_of(grammar: Grammar) -> tuple[str, bool]:
    """A schema and whether properties that it does not name are none of it."""
    # In one line, as json.dumps writes it: models that may, add blanks without end.
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return '{"type": "object"}', False
    return grammar.text, True


@contextmanager
def _translated(grammar: Grammar) -> Iterator[None]:
    """The library's complaints as errors that name the field; MemoryError if it had none left."""
    try:
        yield
    except RuntimeError as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        reason = _LOCATION.sub("", str(error)).strip().split("\n")[0][:200]
        allowed = f"{_NAMES[grammar.kind]} ({reason})"
        raise InvalidArgument(grammar.field, grammar.text, allowed) from error


def _import_library() -> ModuleType:
    import xgrammar

    return xgrammar
