"""What a body asks for: one request, for some prompts, with some choices each."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.router.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

_MAX_TOKEN_ID = 2**32 - 1
_LONG_INTEGER = 1
#: Those that are no plain values, or lists of them.
_APART = ("prompt", "grammar")


@dataclass(frozen=True)
class Asked:
    """A body that was read.

    Args:
        request: what every prompt is continued by; its own prompt is the first.
        is_echoed: whether answers begin with their prompts.
    """

    request: GenerationRequest
    prompts: tuple[Prompt, ...]
    num_choices: int = 1
    is_streamed: bool = False
    includes_usage: bool = False
    is_echoed: bool = False

    @property
    def requests(self) -> list[GenerationRequest]:
        """One for each prompt."""
        return [replace(self.request, prompt=prompt) for prompt in self.prompts]

    def pack(self) -> bytes:
        """Raises InvalidArgument for token ids that no vocabulary has."""
        request, grammar = self.request, self.request.grammar
        values = {f.name: getattr(request, f.name) for f in fields(request)}
        return bytes(
            msgpack.packb(
                {
                    "values": {k: _storable(v) for k, v in values.items() if k not in _APART},
                    "grammar": grammar and [grammar.kind.value, grammar.text, grammar.field],
                    "prompts": [pack_prompt(prompt) for prompt in self.prompts],
                    "num_choices": self.num_choices,
                    "is_streamed": self.is_streamed,
                    "includes_usage": self.includes_usage,
                    "is_echoed": self.is_echoed,
                }
            )
        )

    @classmethod
    def unpack(cls, data: bytes) -> Asked:
        whole = msgpack.unpackb(data, ext_hook=_long_integer, use_list=False)
        prompts = tuple(map(unpack_prompt, whole.pop("prompts")))
        values, grammar = whole.pop("values"), whole.pop("grammar")
        if grammar is not None:
            kind, text, field = grammar
            grammar = Grammar(GrammarKind(kind), text, field)
        return cls(GenerationRequest(prompts[0], grammar=grammar, **values), prompts, **whole)


def pack_prompt(prompt: Prompt) -> Any:
    """As msgpack takes it: a text, the bytes of token ids, or a list of messages."""
    match prompt:
        case TextPrompt(text):
            return text
        case TokenPrompt(token_ids):
            return pack_token_ids(token_ids)
        case ChatPrompt(messages):
            return [[message.role, message.content] for message in messages]


def unpack_prompt(packed: Any) -> Prompt:
    if isinstance(packed, str):
        return TextPrompt(packed)
    if isinstance(packed, bytes):
        return TokenPrompt(unpack_token_ids(packed))
    return ChatPrompt(tuple(ChatMessage(role, content) for role, content in packed))


def check_token_ids(token_ids: tuple[int, ...]) -> None:
    """Raise InvalidArgument for token ids that no vocabulary has."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) <= _MAX_TOKEN_ID):
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id <= _MAX_TOKEN_ID:
                raise InvalidArgument(f"prompt[{position}]", token_id, "token ids")


def pack_token_ids(token_ids: tuple[int, ...]) -> bytes:
    """Raises InvalidArgument as `check_token_ids`."""
    check_token_ids(token_ids)
    return array("I", token_ids).tobytes()


def unpack_token_ids(packed: bytes) -> tuple[int, ...]:
    return tuple(array("I", packed))


def _storable(value: Any) -> Any:
    """Integers of more than 64 bits, which are refused later, in a form of their own."""
    if isinstance(value, tuple):
        return [_storable(part) for part in value]
    if isinstance(value, int) and value.bit_length() > 63:
        packed = value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
        return msgpack.ExtType(_LONG_INTEGER, packed)
    return value


def _long_integer(code: int, packed: bytes) -> int:
    assert code == _LONG_INTEGER
    return int.from_bytes(packed, "big", signed=True)
