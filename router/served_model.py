"""One of the models that a cluster serves: what its requests are checked, decoded, placed by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from colm_serve.config import ClusterConfig
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.placer import Placer
from colm_serve.router.reading.reader import Reader
from colm_serve.router.request import Prompt, TextPrompt, TokenPrompt
from colm_serve.router.tokenizer import Tokenizer
from colm_serve.router.validation import Validator


@dataclass(frozen=True)
class ServedModel:
    """A model by its name. Its requests wait in a line of their own, for workers of their own."""

    facts: ModelFacts
    validator: Validator
    placer: Placer
    decode_text: Callable[[Sequence[int]], str] | None
    token_bytes: Callable[[int], bytes]

    @classmethod
    def make(
        cls,
        config: ClusterConfig,
        facts: ModelFacts,
        tokenizer: Tokenizer | None,
        placer: Placer,
        reader: Reader,
    ) -> ServedModel:
        """Raises InvalidConfig as `Validator`."""
        encode = None if tokenizer is None else partial(reader.encode, facts.name, tokenizer)
        sla_classes, default = config.sla_classes, config.default_sla_class
        return cls(
            facts,
            Validator(facts, encode, sla_classes, default, config.limits),
            placer,
            None if tokenizer is None else tokenizer.decode,
            _unknown if tokenizer is None else tokenizer.token_bytes,
        )

    def prompt_text(self, prompt: Prompt) -> str:
        """What a prompt says; empty where token ids stand for no text."""
        match prompt:
            case TextPrompt(text):
                return text
            case TokenPrompt(token_ids) if self.decode_text is not None:
                # A longer one is refused.
                begin = token_ids[: self.facts.max_context]
                known = [i for i in begin if 0 <= i < self.facts.vocab_size]
                return self.decode_text(known)
        return ""


def _unknown(token_id: int) -> bytes:
    """The bytes of a token where there is no tokenizer."""
    return b""
