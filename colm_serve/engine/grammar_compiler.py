"""Grammars made ready for one model's vocabulary, by xgrammar."""

from __future__ import annotations

import functools
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from colm_serve.core import SamplingParams
from colm_serve.engine.empty_grammar import is_empty
from colm_serve.engine.json_schema import check_schema
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.model.config import ColmConfig
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


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar and the tokens that may follow its end; shared by all who ask for it."""

    grammar: Grammar
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    compiled: xgrammar.CompiledGrammar
    _library: ModuleType

    def new_matcher(self) -> xgrammar.GrammarMatcher:
        """A matcher at the beginning of the text."""
        stops = list(self.stop_token_ids)
        matcher: xgrammar.GrammarMatcher = self._library.GrammarMatcher(
            self.compiled, override_stop_tokens=stops
        )
        return matcher


class GrammarCompiler:
    """Compiles for the tokenizer of a model folder; thread-safe.

    Nothing is read or imported before the first grammar: the library costs half a second
    and 40 MB.

    Args:
        folder: None for a model that is in memory only, which has no tokenizer.
    """

    def __init__(self, folder: Path | None, config: ColmConfig) -> None:
        self._folder = folder
        self._vocab_size = config.vocab_size
        self._eos_token_ids = config.eos_token_ids
        self._lock = threading.Lock()
        self._backend: _Backend | None = None

    def compile(self, sampling: SamplingParams) -> CompiledGrammar | None:
        """The request's grammar; None when it has none. Takes from milliseconds to seconds.

        Raises:
            InvalidArgument: malformed, not supported, or one that no text of this model's tokens
                can begin; or the model has no tokenizer, or no token that ends a text.
            CheckpointError: the model's tokenizer cannot be read.
        """
        grammar = sampling.grammar
        if grammar is None:
            return None
        backend = self._get_backend(grammar)
        stops = [*self._eos_token_ids, *filter(backend.is_special, sampling.stop_token_ids)]
        if not stops:
            allowed = "none: this model has no token that ends a text"
            raise InvalidArgument(grammar.field, grammar.text, allowed)
        compiled = backend.compile(grammar)
        if not backend.has_text(grammar):
            raise InvalidArgument(grammar.field, grammar.text, "a grammar that some text matches")
        return CompiledGrammar(grammar, tuple(stops), self._vocab_size, compiled, backend.library)

    def _get_backend(self, grammar: Grammar) -> _Backend:
        with self._lock:
            if self._backend is None:
                tokenizer = None if self._folder is None else load_tokenizer(self._folder)
                if tokenizer is None:
                    allowed = "none: this model has no tokenizer"
                    raise InvalidArgument(grammar.field, grammar.text, allowed)
                self._backend = _Backend(text_vocabulary(tokenizer, self._vocab_size))
            return self._backend


class _Backend:
    """The library, with the vocabulary taken in."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        self.library = _import_library()
        self._vocabulary = vocabulary
        self.library.set_max_recursion_depth(_MAX_NESTING)
        self._of_text = self._make(vocabulary)
        self.has_text = functools.lru_cache(maxsize=256)(self._find_text)
        # The library's strings of bounded length have control characters as they are.
        self._of_json = self._make([b"" if _CONTROL.search(text) else text for text in vocabulary])

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

    def compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        try:
            match grammar.kind:
                case GrammarKind.JSON_OBJECT:
                    return self._of_json.compile_json_schema(
                        '{"type": "object"}', any_whitespace=False, strict_mode=False
                    )
                case GrammarKind.JSON_SCHEMA:
                    check_schema(json.loads(grammar.text), grammar.field)
                    # One line, as json.dumps writes it: models that may, add blanks without end.
                    return self._of_json.compile_json_schema(grammar.text, any_whitespace=False)
                case GrammarKind.REGEX:
                    return self._of_text.compile_regex(grammar.text)
                case GrammarKind.EBNF:
                    return self._of_text.compile_grammar(grammar.text)
        except RuntimeError as error:
            reason = _LOCATION.sub("", str(error)).strip().split("\n")[0][:200]
            allowed = f"{_NAMES[grammar.kind]} ({reason})"
            raise InvalidArgument(grammar.field, grammar.text, allowed) from error

    def _find_text(self, grammar: Grammar) -> bool:
        """Whether a grammar has a text, and a token that it can begin with."""
        compiled = self.compile(grammar)
        if is_empty(compiled.grammar.serialize_json()):
            return False
        matcher = self.library.GrammarMatcher(compiled)
        mask = self.library.allocate_token_bitmask(1, len(self._vocabulary))
        is_limited = matcher.fill_next_token_bitmask(mask)
        return matcher.is_completed() or not is_limited or bool(mask.any())


_NAMES = {
    GrammarKind.JSON_OBJECT: "a JSON object",
    GrammarKind.JSON_SCHEMA: "a JSON schema that some value matches",
    GrammarKind.REGEX: "a regular expression",
    GrammarKind.EBNF: "a grammar in EBNF",
}


def _import_library() -> ModuleType:
    import xgrammar

    return xgrammar
