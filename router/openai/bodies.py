"""The bodies that OpenAI clients send, checked and turned into generation requests.

Fields that this server does not know are accepted, except those that ask for another output
than it would give: these are refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colm_serve.config import LimitsConfig
from colm_serve.core import MAX_LOGPROBS
from colm_serve.errors import InvalidArgument
from colm_serve.router.openai.counts import check_counts
from colm_serve.router.openai.grammar import read_grammar
from colm_serve.router.openai.json_size import check_json
from colm_serve.router.reading.asked import Asked, check_token_ids
from colm_serve.router.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from colm_serve.router.sizes import check_prompt, check_sizes

#: Unsupported fields, and the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True, False),
    "parse_special": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}

#: Fields that a generation request has under the same name; null leaves them out.
_SAME_NAME = (
    "model", "temperature", "top_p", "top_k", "seed", "ignore_eos", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "min_tokens", "sla_class", "level", "min_level",
    "max_level", "cache_salt", "ttft_ms", "tpot_ms", "deadline_s", "add_special_tokens",
    "parse_special",
)  # fmt: skip

#: Of the ids that the wire can carry.
_MAX_ID_DIGITS = 10

#: Better words than the checker's for fields that may be of several kinds.
_ALLOWED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string or a list of strings",
    "messages": "a list of messages, each with a role and text as its content",
    "logit_bias": "an object of token ids, each with a number",
}


T = TypeVar("T")
#: Its first wrong item is the only one that is told of, and looked at.
_List = Annotated[list[T], Field(fail_fast=True)]


class _Body(BaseModel):
    # Strict: "0.5" is not a number, nor true an integer.
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Body):
    include_usage: bool = False


class _GenerationBody(_Body):
    """What both endpoints take."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | _List[str] | None = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: _List[int] | None = None
    min_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sla_class: str | None = None
    level: int | None = None
    min_level: int | None = None
    max_level: int | None = None
    cache_salt: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_s: float | None = None

    def _asked(
        self,
        limits: LimitsConfig,
        prompts: tuple[Prompt, ...],
        max_tokens: int | None,
        logprobs: int | None,
        *,
        is_echoed: bool = False,
    ) -> Asked:
        num_choices = 1 if self.n is None else self.n
        if not 1 <= num_choices <= limits.max_choices:
            raise InvalidArgument("n", num_choices, f"1 to {limits.max_choices}")
        if len(prompts) * num_choices > limits.max_generations:
            allowed = f"{limits.max_generations} choices of all prompts, which are {len(prompts)}"
            raise InvalidArgument("n", num_choices, allowed)
        scored = logprobs if is_echoed else None
        options = self.stream_options
        return Asked(
            self._request(prompts[0], max_tokens, logprobs, scored),
            prompts,
            num_choices,
            is_streamed=bool(self.stream),
            includes_usage=options is not None and options.include_usage,
            is_echoed=is_echoed,
        )

    def _request(
        self,
        prompt: Prompt,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> GenerationRequest:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        values = {name: getattr(self, name, None) for name in _SAME_NAME}
        return GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=read_grammar(self.response_format, self.structured_outputs),
            **{name: value for name, value in values.items() if value is not None},
        )


class CompletionBody(_GenerationBody):
    """POST /v1/completions."""

    name: ClassVar[str] = "completion"
    prompt: str | _List[str] | _List[int] | _List[_List[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None

    def asked(self, limits: LimitsConfig) -> Asked:
        """What the body asks for; raises InvalidArgument for what is never allowed."""
        prompts = self._prompts()
        for prompt in prompts:
            if isinstance(prompt, TokenPrompt):  # All of them, before any is worked on.
                check_token_ids(prompt.token_ids)
        echo = bool(self.echo)
        return self._asked(limits, prompts, self.max_tokens, self.logprobs, is_echoed=echo)

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(self.prompt),)
        if not self.prompt:
            raise InvalidArgument("prompt", self.prompt, _ALLOWED["prompt"] + ", not empty")
        if isinstance(self.prompt[0], int):
            return (TokenPrompt(tuple(i for i in self.prompt if isinstance(i, int))),)
        return tuple(
            TextPrompt(p) if isinstance(p, str) else TokenPrompt(tuple(p))
            for p in self.prompt
            if not isinstance(p, int)
        )


class TextPart(_Body):
    type: Literal["text"]
    text: str


class MessageBody(_Body):
    role: str
    content: str | _List[TextPart]

    def message(self) -> ChatMessage:
        # OpenAI's newer name of the role.
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return ChatMessage(role, self.content)
        return ChatMessage(role, "".join(part.text for part in self.content))


class ChatBody(_GenerationBody):
    """POST /v1/chat/completions."""

    name: ClassVar[str] = "chat"
    messages: _List[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def asked(self, limits: LimitsConfig) -> Asked:
        """As `CompletionBody.asked`."""
        prompt = ChatPrompt(tuple(message.message() for message in self.messages))
        max_tokens = self.max_completion_tokens
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        return self._asked(limits, (prompt,), max_tokens, self._num_logprobs)

    @property
    def _num_logprobs(self) -> int | None:
        num_top = self.top_logprobs or 0
        if not 0 <= num_top <= MAX_LOGPROBS:
            raise InvalidArgument("top_logprobs", num_top, f"0 to {MAX_LOGPROBS}")
        if num_top and not self.logprobs:
            raise InvalidArgument("top_logprobs", num_top, "0 unless logprobs is true")
        return num_top if self.logprobs else None


KINDS: dict[str, type[CompletionBody] | type[ChatBody]] = {
    kind.name: kind for kind in (CompletionBody, ChatBody)
}


def read_body(
    kind: type[CompletionBody] | type[ChatBody], raw: bytes, limits: LimitsConfig
) -> Asked:
    """Parse and check a body.

    Raises:
        InvalidArgument: not JSON, not UTF-8, a wrong field, one that is not supported, or too much.
    """
    check_counts(raw, limits)
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _first_problem(error) from error
    for field, neutral in _NEUTRAL.items():
        value = (body.model_extra or {}).get(field)
        if value is not None and not any(_is_same(value, n) for n in neutral):
            shown = " or ".join(map(repr, neutral)) or "none"
            raise InvalidArgument(field, value, f"{shown}: this server does not support it")
    for field in ("response_format", "structured_outputs"):
        check_json(field, getattr(body, field), limits)
    check_json("body", body.model_extra, limits)
    asked = body.asked(limits)
    for prompt in asked.prompts:
        check_prompt(prompt, limits)
    check_sizes(asked.request, limits)
    return asked


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in given:
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= _MAX_ID_DIGITS):
            raise InvalidArgument("logit_bias", token_id, "token ids as keys")
    return tuple(sorted({int(token_id): bias for token_id, bias in given.items()}.items()))


def _is_same(value: object, neutral: object) -> bool:
    """Equal, and not an integer against a boolean: logprobs 0 is not logprobs false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _first_problem(error: ValidationError) -> InvalidArgument:
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        return InvalidArgument("body", "a body that cannot be read", f"JSON ({problem['msg']})")
    if not problem["loc"]:
        return InvalidArgument("body", problem["input"], "a JSON object")
    top = str(problem["loc"][0])
    if top in ("prompt", "stop"):
        # Its other problems are those of the kinds that it was not meant to be.
        field, allowed = top, _ALLOWED[top]
    else:
        field = ".".join(str(part) for part in problem["loc"])
        allowed = _ALLOWED.get(top, problem["msg"])
    value = None if problem["type"] == "missing" else problem["input"]
    return InvalidArgument(field, value, allowed)
