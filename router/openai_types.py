"""The bodies that OpenAI clients send, checked and turned into generation requests.

Fields that this server does not know are accepted, except those that ask for another output
than it would give: these are refused by name, never dropped.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from colm_serve.errors import InvalidArgument
from colm_serve.router.request import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

#: Unsupported fields, and the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
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

#: Better words than the checker's for fields that may be of several kinds.
_ALLOWED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string or a list of strings",
    "messages": "a list of messages, each with a role and text as its content",
}


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
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sla_class: str | None = None
    level: int | None = None
    min_level: int | None = None
    max_level: int | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _request(self, prompt: Prompt, max_tokens: int | None) -> GenerationRequest:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationRequest(
            prompt=prompt,
            model=self.model,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k is None else self.top_k,
            seed=self.seed,
            ignore_eos=bool(self.ignore_eos),
            stop=tuple(stop),
            sla_class=self.sla_class,
            level=self.level,
            min_level=self.min_level,
            max_level=self.max_level,
        )


class CompletionBody(_GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def requests(self) -> list[GenerationRequest]:
        """One request for each prompt; raises InvalidArgument when there is none."""
        return [self._request(prompt, self.max_tokens) for prompt in self._prompts()]

    def _prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [TextPrompt(self.prompt)]
        if not self.prompt:
            raise InvalidArgument("prompt", self.prompt, _ALLOWED["prompt"] + ", not empty")
        if isinstance(self.prompt[0], int):
            return [TokenPrompt(tuple(i for i in self.prompt if isinstance(i, int)))]
        return [
            TextPrompt(p) if isinstance(p, str) else TokenPrompt(tuple(p))
            for p in self.prompt
            if not isinstance(p, int)
        ]


class TextPart(_Body):
    type: Literal["text"]
    text: str


class MessageBody(_Body):
    role: str
    content: str | list[TextPart]

    def message(self) -> ChatMessage:
        # OpenAI's newer name of the role.
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return ChatMessage(role, self.content)
        return ChatMessage(role, "".join(part.text for part in self.content))


class ChatBody(_GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None

    def requests(self) -> list[GenerationRequest]:
        prompt = ChatPrompt(tuple(message.message() for message in self.messages))
        max_tokens = self.max_completion_tokens
        return [self._request(prompt, self.max_tokens if max_tokens is None else max_tokens)]


Body = TypeVar("Body", bound=_GenerationBody)


def read_body(kind: type[Body], raw: bytes) -> Body:
    """Parse and check a body.

    Raises:
        InvalidArgument: not JSON, not UTF-8, a wrong field, or one that is not supported.
    """
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _first_problem(error) from error
    for field, neutral in _NEUTRAL.items():
        value = (body.model_extra or {}).get(field)
        if value is not None and not any(_is_same(value, n) for n in neutral):
            shown = " or ".join(map(repr, neutral)) or "none"
            raise InvalidArgument(field, value, f"{shown}: this server does not support it")
    return body


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
