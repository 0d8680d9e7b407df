"""The process that reads what is too large for the router's event loop; run by a `Box`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from colm_serve.box import Work, serve
from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument
from colm_serve.router.openai.bodies import KINDS, read_body
from colm_serve.router.reading.asked import pack_token_ids, unpack_prompt
from colm_serve.router.reading.calls import pack_answer, pack_error, unpack_call
from colm_serve.router.reading.encode import encode
from colm_serve.router.request import TokenPrompt
from colm_serve.router.serde import read_request
from colm_serve.router.tokenizer import Tokenizer


class Program:
    """What the process can be asked for.

    Args:
        models: the folder and the longest context of each, by name.
    """

    def __init__(self, limits: Mapping[str, Any], models: Mapping[str, tuple[str, int]]) -> None:
        self._limits = LimitsConfig.model_validate(limits)
        self._models = models

    def body(self, kind: str, raw: bytes) -> bytes:
        return read_body(KINDS[kind], raw, self._limits).pack()

    def message(self, raw: bytes) -> bytes:
        """Nothing, but refuses a GenerateRequest that the router would refuse."""
        read_request(raw, self._limits)
        return b""

    def encode(self, model: str, prompt: Any, add_special: bool, parse_special: bool) -> bytes:
        text = unpack_prompt(prompt)
        assert not isinstance(text, TokenPrompt)
        token_ids = encode(
            self._tokenizer(model),
            text,
            self._limits,
            self._models[model][1],
            add_special_tokens=add_special,
            parse_special=parse_special,
        )
        return pack_token_ids(token_ids)

    @functools.cache  # noqa: B019 - it lives as long as the process
    def _tokenizer(self, model: str) -> Tokenizer:
        tokenizer = Tokenizer.load(Path(self._models[model][0]))
        assert tokenizer is not None, "the router has one"
        return tokenizer


def make_work(limits: Mapping[str, Any], models: Mapping[str, tuple[str, int]]) -> Work:
    program = Program(limits, models)
    methods: dict[str, Callable[..., bytes]] = {
        "body": program.body,
        "message": program.message,
        "encode": program.encode,
    }

    def work(data: bytes) -> bytes:
        what, arguments = unpack_call(data)
        try:
            return pack_answer(methods[what](*arguments))
        except InvalidArgument as error:
            return pack_error(error)

    return work


if __name__ == "__main__":
    serve(make_work)
