"""A generation as clients see it: the request and its events."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.core import FinishReason, Logprobs, ScoredPrompt, StageTimings
from colm_serve.grammar import Grammar


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for, unchecked; None leaves a choice to the router.

    `model` may be empty, and may say a level: see `read_model_name`. With `prompt_logprobs`,
    `max_tokens` may be 0: the prompt is scored, and that is all. How a text prompt is read
    `add_special_tokens` and `parse_special` say, as in `Tokenizer.encode`.
    """

    prompt: Prompt
    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    sla_class: str | None = None
    level: int | None = None
    min_level: int | None = None
    max_level: int | None = None
    cache_salt: str = ""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_s: float | None = None
    add_special_tokens: bool = True
    parse_special: bool = True


@dataclass(frozen=True)
class Usage:
    """What a generation cost. Cached and shipped tokens are of the prompt."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_shipped_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class Started:
    """A decode worker has admitted the request; `request_id` was made by the router.

    In a brownout the level is below what the request would have got from idle workers.
    """

    request_id: str
    model: str
    level: int
    is_brownout: bool = False


@dataclass(frozen=True)
class Token:
    """One token; `text` may be empty while a character or a stop string may be incomplete."""

    token_id: int
    text: str
    level: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Finished:
    """The end; `text` is what was still held back when the last token had come."""

    reason: FinishReason
    usage: Usage
    timings: StageTimings
    text: str = ""


GenerationEvent = Started | ScoredPrompt | Token | Finished
