"""Grammars made ready for one model's vocabulary."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from colm_serve.core import SamplingParams
from colm_serve.engine.grammar_backend import GrammarBackend
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar
from colm_serve.model.config import ColmConfig

if TYPE_CHECKING:
    import xgrammar


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
        self.folder = folder
        self.vocab_size = config.vocab_size
        self._eos_token_ids = config.eos_token_ids
        self._lock = threading.Lock()
        self._backend: GrammarBackend | None = None

    def compile(self, sampling: SamplingParams) -> CompiledGrammar | None:
        """The request's grammar, once `check_in_a_box` has passed it; None when it has none.

        Raises:
            InvalidArgument: as `find_stops`.
            CheckpointError: the model's tokenizer cannot be read.
        """
        grammar = sampling.grammar
        if grammar is None:
            return None
        stops = self.find_stops(sampling)
        backend = self._get_backend(grammar)
        compiled = backend.compile(grammar)
        return CompiledGrammar(grammar, stops, self.vocab_size, compiled, backend.library)

    def find_stops(self, sampling: SamplingParams) -> tuple[int, ...]:
        """The tokens that may follow the end of the request's grammar.

        Raises:
            InvalidArgument: the model has no token that ends a text, or no tokenizer.
            CheckpointError: the model's tokenizer cannot be read.
        """
        grammar = sampling.grammar
        assert grammar is not None
        backend = self._get_backend(grammar)
        stops = (*self._eos_token_ids, *filter(backend.is_special, sampling.stop_token_ids))
        if not stops:
            allowed = "none: this model has no token that ends a text"
            raise InvalidArgument(grammar.field, grammar.text, allowed)
        return stops

    def _get_backend(self, grammar: Grammar) -> GrammarBackend:
        with self._lock:
            if self._backend is None:
                self._backend = GrammarBackend.load(self.folder, self.vocab_size)
                if self._backend is None:
                    allowed = "none: this model has no tokenizer"
                    raise InvalidArgument(grammar.field, grammar.text, allowed)
            return self._backend
