"""Reads what clients send: at once what is small, in other processes what is large.

JSON, protobuf messages, chat templates and grammars hold the interpreter, whatever thread they are
read in, for as long as what was sent makes them. So does the text of a prompt until it is tokens.
What is above a size goes to processes that are killed past their limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from colm_serve.box import Box, BoxFailed
from colm_serve.box_pool import BoxPool
from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument, RequestTooLarge
from colm_serve.router.openai.bodies import ChatBody, CompletionBody, read_body
from colm_serve.router.reading.asked import (
    Asked,
    pack_prompt,
    unpack_token_ids,
)
from colm_serve.router.reading.calls import pack_call, unpack_answer
from colm_serve.router.reading.encode import check_roles, encode
from colm_serve.router.request import ChatPrompt, GenerationRequest, TextPrompt
from colm_serve.router.sizes import check_prompt
from colm_serve.router.tokenizer import Tokenizer

#: Of a body or message that is read on the event loop, in a few milliseconds at worst.
SMALL_BYTES = 32_768
#: Of a text that a thread encodes while others run, and of a chat that it renders.
SMALL_TEXT_CHARS, SMALL_CHAT_CHARS, SMALL_CHAT_MESSAGES = 65_536, 16_384, 64

NUM_PROCESSES = 2
MAX_CALLS = 64
MAX_WAIT_S = 60.0
#: What reading one request may take.
CPU_S, TIMEOUT_S, MEMORY_BYTES = 15.0, 30.0, 2**30


class Reader:
    """Of one router; its processes start with the first large request, or with `start`.

    Args:
        models: the folder and the longest context of each model, by name.
    """

    def __init__(self, limits: LimitsConfig, models: Mapping[str, tuple[str, int]]) -> None:
        self.limits = limits
        self._models = dict(models)
        arguments = (limits.model_dump(), self._models)
        boxes = (
            Box("colm_serve.router.reading.program", *arguments, memory_bytes=MEMORY_BYTES)
            for _ in range(NUM_PROCESSES)
        )
        self._boxes = BoxPool(tuple(boxes), max_calls=MAX_CALLS, max_wait_s=MAX_WAIT_S)

    def start(self) -> None:
        """Have the processes ready before they are needed."""
        self._boxes.start()

    async def close(self) -> None:
        await asyncio.to_thread(self._boxes.close)

    async def body(self, kind: type[CompletionBody] | type[ChatBody], raw: bytes) -> Asked:
        """Read a body; raises InvalidArgument, or as `_call`."""
        if len(raw) <= SMALL_BYTES:
            return read_body(kind, raw, self.limits)
        call = pack_call("body", kind.name, raw)
        return Asked.unpack(await self._call("body", f"{len(raw)} bytes", call))

    async def message(self, raw: bytes) -> None:
        """Refuse a GenerateRequest that takes long to read, or could not be served."""
        if len(raw) > SMALL_BYTES:
            await self._call("request", f"{len(raw)} bytes", pack_call("message", raw))

    async def encode(
        self, model: str, tokenizer: Tokenizer, request: GenerationRequest
    ) -> tuple[int, ...]:
        """Token ids of a text or a chat, as many as the context has room for.

        Raises:
            InvalidArgument: as `reading.encode.encode`, or as `_call`.
        """
        prompt = request.prompt
        assert isinstance(prompt, TextPrompt | ChatPrompt)
        check_prompt(prompt, self.limits)
        how = (request.add_special_tokens, request.parse_special)
        match prompt:
            case TextPrompt(text):
                field, num_chars = "prompt", len(text)
                is_small = num_chars <= SMALL_TEXT_CHARS and request.parse_special
            case ChatPrompt(messages):
                check_roles(messages)
                field, num_chars = "messages", sum(len(m.content) for m in messages)
                is_small = (
                    num_chars <= SMALL_CHAT_CHARS
                    and len(messages) <= SMALL_CHAT_MESSAGES
                    and not tokenizer.spells_control_tokens(messages)
                )
        if is_small:
            return await asyncio.to_thread(
                encode,
                tokenizer,
                prompt,
                self.limits,
                self._models[model][1],
                add_special_tokens=how[0],
                parse_special=how[1],
            )
        packed = pack_prompt(prompt)
        try:
            call = pack_call("encode", model, packed, *how)
        except UnicodeEncodeError as error:
            shown, allowed = error.object[error.start], "Unicode text without lone surrogates"
            raise InvalidArgument(field, shown, allowed) from error
        return unpack_token_ids(await self._call(field, f"{num_chars} characters", call))

    async def _call(self, field: str, shown: str, call: bytes) -> bytes:
        """Raises RequestTooLarge when the limits do not suffice, ResourceExhausted as `BoxPool`."""
        try:
            answer = await self._boxes.call(call, cpu_s=CPU_S, timeout_s=TIMEOUT_S)
        except BoxFailed as error:
            allowed = f"what is read within {CPU_S:g} s and {MEMORY_BYTES >> 20} MiB ({error})"
            raise RequestTooLarge(field, shown, allowed) from error
        return unpack_answer(answer)
