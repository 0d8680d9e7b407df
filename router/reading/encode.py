"""A prompt's token ids, with its sizes looked at before each step that they make longer."""

from __future__ import annotations

from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument
from colm_serve.router.request import ChatMessage, ChatPrompt, TextPrompt
from colm_serve.router.sizes import check_chars
from colm_serve.router.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


def encode(
    tokenizer: Tokenizer,
    prompt: TextPrompt | ChatPrompt,
    limits: LimitsConfig,
    max_context: int,
    *,
    add_special_tokens: bool,
    parse_special: bool,
) -> tuple[int, ...]:
    """Raises InvalidArgument, and RequestTooLarge for what cannot fit whatever its tokens are."""
    max_chars = limits.max_prompt_chars
    if tokenizer.longest_token_chars is not None:
        max_chars = min(max_chars, max_context * tokenizer.longest_token_chars)
    match prompt:
        case TextPrompt(text):
            check_chars("prompt", len(text), max_chars)
            token_ids = tokenizer.encode(
                text, add_special_tokens=add_special_tokens, parse_special=parse_special
            )
            return check_length("prompt", token_ids, max_context)
        case ChatPrompt(messages):
            check_roles(messages)
            return check_length("messages", tokenizer.encode_chat(messages, max_chars), max_context)


def check_length(field: str, token_ids: tuple[int, ...], max_context: int) -> tuple[int, ...]:
    """Token ids that a context has room for, and for one more."""
    if not 1 <= len(token_ids) < max_context:
        allowed = f"1 to {max_context - 1} tokens, to leave room for one"
        raise InvalidArgument(field, f"{len(token_ids)} tokens", allowed)
    return token_ids


def check_roles(messages: tuple[ChatMessage, ...]) -> None:
    if not messages:
        raise InvalidArgument("messages", [], "one or more messages")
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgument(f"messages[{position}].role", message.role, ", ".join(ROLES))
