"""How much stands in a body, counted before its fields are checked one by one.

Checking takes microseconds for each item of a list, and more where it may be of several kinds;
counting takes what parsing does.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from colm_serve.config import LimitsConfig
from colm_serve.core import MAX_LOGIT_BIAS_TOKENS, MAX_STOP_TOKEN_IDS
from colm_serve.errors import InvalidArgument
from colm_serve.router.sizes import check_chars, check_count


def check_counts(raw: bytes, limits: LimitsConfig) -> None:
    """Raise InvalidArgument that names a field with more items or characters than it may have.

    What is no JSON object passes: its fields are checked next.
    """
    try:
        body = from_json(raw)
    except ValueError:
        return
    if not isinstance(body, dict):
        return
    _check_prompt(body.get("prompt"), limits)
    for field, most in (
        ("messages", limits.max_messages),
        ("stop", limits.max_stop_strings),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS),
        ("logit_bias", MAX_LOGIT_BIAS_TOKENS),
    ):
        if isinstance(value := body.get(field), list | dict):
            check_count(field, len(value), most)


def _check_prompt(prompt: Any, limits: LimitsConfig) -> None:
    if isinstance(prompt, str):
        check_chars("prompt", len(prompt), limits.max_prompt_chars)
    if not isinstance(prompt, list):
        return
    if prompt and isinstance(prompt[0], int):
        check_count("prompt", len(prompt), limits.max_token_ids)
        return
    check_count("prompt", len(prompt), limits.max_prompts)
    num_ids = sum(len(part) for part in prompt if isinstance(part, list))
    if num_ids > limits.max_token_ids:
        shown = f"lists of {num_ids} token ids"
        raise InvalidArgument("prompt", shown, f"at most {limits.max_token_ids} in all")
