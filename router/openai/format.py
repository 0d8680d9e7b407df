"""What OpenAI clients get back: whole answers and stream chunks, as JSON-ready dicts.

Beyond OpenAI's fields, a chunk's choice has `level`, the chain level that made its token, and a
whole answer's choice has `level`, a list with the level of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from colm_serve.core import FinishReason, Logprobs, ScoredPrompt
from colm_serve.router.openai.logprobs import chat_logprobs, completion_logprobs, num_characters
from colm_serve.router.request import Finished, GenerationEvent, Started, Token

Json = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How one endpoint names and nests things."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    is_chat: bool

    def whole_text(self, text: str) -> Json:
        if self.is_chat:
            return {"message": {"role": "assistant", "content": text}}
        return {"text": text}

    def chunk_text(self, text: str) -> Json:
        if self.is_chat:
            return {"delta": {"content": text} if text else {}}
        return {"text": text}

    def logprobs(self, logprobs: Sequence[Logprobs], text_offset: int) -> Json | None:
        """Of some tokens in a row; null when none were asked for."""
        if not logprobs:
            return None
        if self.is_chat:
            return chat_logprobs(logprobs)
        return completion_logprobs(logprobs, text_offset)


COMPLETION = Format("cmpl-", "text_completion", "text_completion", is_chat=False)
CHAT = Format("chatcmpl-", "chat.completion", "chat.completion.chunk", is_chat=True)


@dataclass
class Choice:
    """One generation's answer, gathered from its events."""

    echo: str = ""  # the prompt, where the answer is to begin with it
    text: str = ""
    levels: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    num_characters: int = 0  # that begin in the tokens with logprobs
    finished: Finished | None = None

    def add(self, event: GenerationEvent) -> None:
        match event:
            case Started():
                self.text = self.echo
            case ScoredPrompt():
                self._add_logprobs(event.logprobs)
            case Token():
                self.text += event.text
                self.levels.append(event.level)
                if event.logprobs is not None:
                    self._add_logprobs([event.logprobs])
            case Finished():
                self.text += event.text
                self.finished = event

    def _add_logprobs(self, logprobs: Sequence[Logprobs]) -> None:
        self.logprobs += logprobs
        self.num_characters += sum(num_characters(entry.chosen) for entry in logprobs)


class Answer:
    """One reply, whole or in chunks; its id is that of the first of its requests to start.

    It has `num_choices` choices for each prompt, those of the first prompt first.
    """

    def __init__(
        self,
        style: Format,
        created: int,
        num_prompts: int,
        num_choices: int = 1,
        echoes: Sequence[str] | None = None,
    ) -> None:
        """`echoes`: the text of each prompt, where answers begin with it."""
        self._style = style
        self._created = created
        self._head: Json = {}
        self.starts: list[Started] = []
        self._num_per_prompt = num_choices
        echoes = [""] * num_prompts if echoes is None else echoes
        self._choices = [Choice(echo) for echo in echoes for _ in range(num_choices)]

    def add(self, index: int, event: GenerationEvent) -> list[Json]:
        """Note an event of one of the choices; returns the chunks that a stream sends for it."""
        if isinstance(event, Started):
            if not self.starts:
                request_id = self._style.id_prefix + event.request_id
                self._head = {"id": request_id, "model": event.model}
            self.starts.append(event)
        choice = self._choices[index]
        text_offset = choice.num_characters
        choice.add(event)
        match event:
            case Started():
                if choice.echo:
                    echo = self._style.chunk_text(choice.echo)
                    return [self._chunk(index, echo, event.level, None)]
                if not self._style.is_chat:
                    return []
                delta = {"delta": {"role": "assistant", "content": ""}}
                return [self._chunk(index, delta, event.level, None)]
            case ScoredPrompt():
                logprobs = self._style.logprobs(event.logprobs, text_offset)
                return [self._chunk(index, self._style.chunk_text(""), None, None, logprobs)]
            case Token():
                text = self._style.chunk_text(event.text)
                new = [] if event.logprobs is None else [event.logprobs]
                logprobs = self._style.logprobs(new, text_offset)
                return [self._chunk(index, text, event.level, None, logprobs)]
            case Finished():
                level = choice.levels[-1] if choice.levels else None
                text = self._style.chunk_text(event.text)
                return [self._chunk(index, text, level, event.reason)]

    def usage_chunk(self) -> Json:
        """The chunk that ends a stream with `include_usage`."""
        return {**self._reply(self._style.chunk_object), "choices": [], "usage": self._usage()}

    def whole(self) -> Json:
        """The reply to a request that is not streamed."""
        choices = [
            {
                "index": index,
                **self._style.whole_text(choice.text),
                "logprobs": self._style.logprobs(choice.logprobs, 0),
                "finish_reason": choice.finished.reason.value if choice.finished else None,
                "level": choice.levels,
            }
            for index, choice in enumerate(self._choices)
        ]
        reply = self._reply(self._style.whole_object)
        return {**reply, "choices": choices, "usage": self._usage()}

    def _chunk(
        self,
        index: int,
        text: Json,
        level: int | None,
        reason: FinishReason | None,
        logprobs: Json | None = None,
    ) -> Json:
        choice = {
            "index": index,
            **text,
            "logprobs": logprobs,
            "finish_reason": None if reason is None else reason.value,
            "level": level,
        }
        return {**self._reply(self._style.chunk_object), "choices": [choice]}

    def _reply(self, kind: str) -> Json:
        return {**self._head, "object": kind, "created": self._created}

    def _usage(self) -> Json:
        """Every choice's output, and each prompt once, as its first choice found it."""
        usages = [None if c.finished is None else c.finished.usage for c in self._choices]
        prompts = [usage for usage in usages[:: self._num_per_prompt] if usage is not None]
        num_prompt = sum(usage.num_prompt_tokens for usage in prompts)
        num_output = sum(usage.num_output_tokens for usage in usages if usage is not None)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(u.num_cached_tokens for u in prompts)},
        }
