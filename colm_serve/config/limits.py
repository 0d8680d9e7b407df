"""How large a request may be."""

from __future__ import annotations

from pydantic import Field

from colm_serve.config.section import Count, Section


class LimitsConfig(Section):
    """What one request may hold, looked at before anything is done for it.

    The defaults let a context of 128K tokens be filled, in any script. Bodies and prompts beyond
    theirs are refused with HTTP status 413, the others with 400; gRPC says INVALID_ARGUMENT.
    """

    max_body_bytes: Count = Field(
        default=8 * 2**20, le=64 * 2**20, description="of an HTTP body, a gRPC message"
    )
    max_prompt_chars: Count = Field(
        default=2_000_000,
        description="of a prompt, or of all messages; the model's context may hold fewer",
    )
    max_prompts: Count = Field(default=1024, description="in one list of prompts")
    max_token_ids: Count = Field(default=2**20, description="of all prompts that are token ids")
    max_messages: Count = 2048
    max_choices: Count = Field(default=128, description="n, the choices of a prompt")
    max_generations: Count = Field(default=2048, description="prompts times choices")
    max_stop_strings: Count = 16
    max_stop_chars: Count = Field(default=4096, description="of all stop strings")
    max_json_depth: Count = Field(default=64, description="lists and objects in one another")
    max_json_keys: Count = Field(default=10_000, description="of all objects of a body")
