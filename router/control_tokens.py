"""Keeps texts of users from making control tokens.

A control token is one that decoding leaves out: what its vocabulary calls special, `<|im_end|>` and
the like. Only a model's own chat template makes these. Added tokens that are text, as `<think>` is
where decoding shows it, come from whoever writes them.

Templates may do with a text what they like, so a spelling in it is broken before they see it, by a
character that no text has: whatever a template trims, joins or turns into capitals, the spelling is
still broken. The control tokens in what was rendered are then the template's own. They are renamed
to what only a second tokenizer knows, and that knows no spelling: all else is text to it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as HfTokenizer

from colm_serve.errors import CheckpointError, InvalidArgument
from colm_serve.router.spellings import BREAK, Spellings, any_of

# Noncharacters, as `BREAK` is one.
_BEGIN, _END = "\ufdd0", "\ufdef"
_DIGITS = {ord(f"{digit:x}"): chr(0xFDD1 + digit) for digit in range(16)}
_RESERVED = re.compile("[\ufdd0-\ufdef]")


class ControlTokens:
    """Those of one tokenizer; thread-safe.

    Args:
        others: spellings of tokens that begin or end texts, whether they are special or not.
    """

    def __init__(self, tokenizer: HfTokenizer, others: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        ends = set(others)
        controls = {
            token.content: (token_id, token.normalized)
            for token_id, token in added.items()
            if token.special or token.content in ends
        }
        # Of those that begin alike the longest is meant.
        self._ids = {text: controls[text][0] for text in sorted(controls, key=len, reverse=True)}
        self._names = {text: _name(token_id) for text, token_id in self._ids.items()}
        self._own = re.compile(f"(?:{any_of(self._ids)})(?!{BREAK})")
        self._spellings = Spellings(self._ids)
        is_normalized = any(normalized for _, normalized in controls.values())
        self._normalizer = tokenizer.normalizer if is_normalized else None

    def break_spellings(self, field: str, texts: Sequence[str]) -> list[str] | None:
        """The texts with each control token that they spell broken; None when there is none.

        Raises:
            InvalidArgument: beside that, they have noncharacters that stand for something here.
        """
        broken = self._spellings.break_all(texts)
        if broken == list(texts) and not any(map(self._is_alike, texts)):
            return None
        _check_characters(field, texts)
        return broken

    def encode_rendered(self, rendered: str) -> tuple[int, ...]:
        """Token ids of what a template made of broken texts."""
        named = self._own.sub(lambda match: self._names[match[0]], rendered)
        return self._encode(named.replace(BREAK, ""), add_special_tokens=False)

    def encode_text(self, field: str, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text in which no spelling is a control token; raises as the above."""
        _check_characters(field, [text])
        return self._encode(text, add_special_tokens=add_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        encode = self._literal.encode_batch_fast
        return tuple(encode([text], add_special_tokens=add_special_tokens)[0].ids)

    @functools.cached_property
    def _literal(self) -> HfTokenizer:
        """The tokenizer with its control tokens under names that no text has."""
        spec = json.loads(self._tokenizer.to_str())
        for token in spec["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._names.get(t, t): i for t, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._names.get(t, t), score] for t, score in model["vocab"]]
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        try:
            literal = HfTokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises no narrower one
            raise CheckpointError(f"tokenizer.json: its control tokens: {error}") from error
        for text, token_id in self._ids.items():
            if literal.token_to_id(self._names[text]) != token_id:
                raise CheckpointError(f"tokenizer.json: {text!r} is not under its own id")
        return literal

    def _is_alike(self, text: str) -> bool:
        """Whether the tokenizer's normalizer makes a control token of what is not spelled so."""
        if self._normalizer is None:
            return False
        return self._spellings.are_in(self._normalizer.normalize_str(text))


def _check_characters(field: str, texts: Iterable[str]) -> None:
    for text in texts:
        if found := _RESERVED.search(text):
            allowed = "text without U+FDD0 to U+FDEF, where a control token's spelling is text"
            raise InvalidArgument(field, found[0], allowed)


def _name(token_id: int) -> str:
    return _BEGIN + f"{token_id:x}".translate(_DIGITS) + _END
