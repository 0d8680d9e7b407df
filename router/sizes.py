"""What a request's fields may hold, looked at before any of them is worked on. Pure."""

from __future__ import annotations

from colm_serve.config import LimitsConfig
from colm_serve.core import MAX_LOGIT_BIAS_TOKENS, MAX_STOP_TOKEN_IDS
from colm_serve.errors import InvalidArgument, RequestTooLarge
from colm_serve.router.request import ChatPrompt, GenerationRequest, Prompt, TextPrompt

MAX_CACHE_SALT = 256


def check_sizes(request: GenerationRequest, limits: LimitsConfig) -> None:
    """Raise InvalidArgument, or RequestTooLarge of a prompt, that names the field and its limit."""
    check_prompt(request.prompt, limits)
    check_stop(request.stop, limits)
    if len(request.cache_salt) > MAX_CACHE_SALT:
        shown = f"{len(request.cache_salt)} characters"
        raise InvalidArgument("cache_salt", shown, f"at most {MAX_CACHE_SALT}")
    check_count("stop_token_ids", len(request.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_count("logit_bias", len(request.logit_bias), MAX_LOGIT_BIAS_TOKENS)


def check_prompt(prompt: Prompt, limits: LimitsConfig) -> None:
    match prompt:
        case TextPrompt(text):
            check_chars("prompt", len(text), limits.max_prompt_chars)
        case ChatPrompt(messages):
            check_count("messages", len(messages), limits.max_messages)
            num_chars = sum(len(m.role) + len(m.content) for m in messages)
            check_chars("messages", num_chars, limits.max_prompt_chars)


def check_stop(stop: tuple[str, ...], limits: LimitsConfig) -> None:
    if len(stop) > limits.max_stop_strings or not all(stop):
        shown = list(stop[: limits.max_stop_strings + 1])
        allowed = f"at most {limits.max_stop_strings} non-empty strings"
        raise InvalidArgument("stop", shown, allowed)
    num_chars = sum(map(len, stop))
    if num_chars > limits.max_stop_chars:
        shown_chars = f"{num_chars} characters"
        raise InvalidArgument("stop", shown_chars, f"at most {limits.max_stop_chars} in all")


def check_chars(field: str, num_chars: int, most: int) -> None:
    """Raises RequestTooLarge."""
    if num_chars > most:
        raise RequestTooLarge(field, f"{num_chars} characters", f"at most {most}")


def check_count(field: str, count: int, most: int) -> None:
    """Raises InvalidArgument."""
    if count > most:
        raise InvalidArgument(field, f"a list of {count}", f"at most {most}")
