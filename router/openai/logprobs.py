"""Logprobs as OpenAI clients read them: one form for completions, another for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colm_serve.core import Logprobs, TokenLogprob

Json = dict[str, Any]


def completion_logprobs(logprobs: Sequence[Logprobs], text_offset: int) -> Json:
    """Lists with an entry a token; `text_offset` is the first one's in the choice's text."""
    offsets = []
    for entry in logprobs:
        offsets.append(text_offset)
        text_offset += num_characters(entry.chosen)
    return {
        "tokens": [token_text(entry.chosen) for entry in logprobs],
        "token_logprobs": [entry.chosen.logprob for entry in logprobs],
        "top_logprobs": [_top(entry) for entry in logprobs],
        "text_offset": offsets,
    }


def chat_logprobs(logprobs: Sequence[Logprobs]) -> Json:
    content = [
        {**_chat_entry(entry.chosen), "top_logprobs": [_chat_entry(top) for top in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def token_text(entry: TokenLogprob) -> str:
    """A token as text; OpenAI's way to write bytes that are no text, and ids without one."""
    if not entry.token:
        return f"token_id:{entry.token_id}"
    try:
        return entry.token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token)


def num_characters(entry: TokenLogprob) -> int:
    """Characters that begin in a token: all of its bytes but those that continue one."""
    return sum(byte & 0xC0 != 0x80 for byte in entry.token)


def _top(logprobs: Logprobs) -> dict[str, float | None] | None:
    """By text; of tokens with the same text the likeliest, which comes first, counts."""
    if logprobs.chosen.logprob is None:
        return None  # As OpenAI has it for the first token of a text.
    best: dict[str, float | None] = {}
    for entry in logprobs.top:
        best.setdefault(token_text(entry), entry.logprob)
    return best


def _chat_entry(entry: TokenLogprob) -> Json:
    has_bytes = bool(entry.token)
    return {
        "token": token_text(entry),
        "logprob": entry.logprob,
        "bytes": list(entry.token) if has_bytes else None,
    }
