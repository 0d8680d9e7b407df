"""Decode workers: their batch, where their prompts are computed, how KV comes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from colm_serve.config.section import Count, Seconds, Section
from colm_serve.config.worker import WorkerConfig

#: A verification has a row more. From 16 rows of a sequence on, a CPU attends with them in blocks,
#: which rounds otherwise than row by row: greedy text would depend on what was drafted.
MAX_DRAFTS = 14


class SpeculationConfig(Section):
    """Tokens drafted at a lower level and verified at the request's own, where that is faster."""

    enabled: bool = True
    sampled: bool = Field(
        default=False,
        description="also for requests with a temperature: each of their tokens then takes the "
        "drafter's scores, drafted or not, and depends on draft_level beside the seed",
    )
    draft_level: Count = 1
    max_drafts: Count = Field(default=8, le=MAX_DRAFTS, description="of one request in one step")


class DecodeConfig(WorkerConfig):
    """A decode worker: at most `max_rows` rows a step."""

    max_rows: Count = 32
    max_waiting: Count = 64
    max_batch_tokens: Count = Field(
        default=256, description="a step's rows, verified drafts and locally computed prompt"
    )
    expected_output_tokens: Count = Field(
        default=256, description="output that pages are reserved for; more is taken as it comes"
    )
    local_prefill_tokens: int = Field(
        default=32, ge=0, description="a missing suffix up to this long is computed here"
    )
    adaptive_prefill: bool = Field(
        default=True,
        description="compute longer ones here too, whole or in part, where measured speeds and "
        "queues make that the least delay, which is decided again while they are waited for; else "
        "only when no prefill worker can",
    )
    frame_timeout_s: Seconds = Field(
        default=10.0,
        description="a prefill worker that sends nothing for so long is left; while it is busy "
        "with other prompts it says so after each of its forward passes",
    )
    stall_timeout_s: Seconds = Field(
        default=30.0, description="a router that takes nothing of its stream for so long loses it"
    )
    kv_codec: Literal["raw", "bf16", "int8", "fp8", "auto"] = Field(
        default="raw",
        description="how prefill workers write K and V for the wire: raw is exact, the others are "
        "smaller; auto is raw while the transfer hides behind the prefill, else the mildest that "
        "would",
    )
    shared_memory: bool = Field(
        default=True,
        description="prefill workers on the same machine, of the same user and PID namespace, put "
        "K and V into memory that both map, with TLS as well: they do not leave the machine",
    )
    kv_connections: Count = Field(
        default=1,
        le=16,
        description="among which the layers of one prompt's K and V are shared, where they do not "
        "come through shared memory: for links that are wider than a core can fill",
    )
    weight_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="how matrices are kept: auto is float32 on a CPU and bfloat16 on a GPU; the "
        "smaller ones are for a CPU, whose steps take as long as their bytes take to read",
    )
    speculation: SpeculationConfig = SpeculationConfig()

    @model_validator(mode="after")
    def _prompts_fit_beside_rows(self) -> DecodeConfig:
        if self.max_batch_tokens <= self.max_rows:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is not above max_rows {self.max_rows}: "
                "a prompt computed beside a full batch would stand still"
            )
        return self
