"""A worker: what it is given of its machine, its KV cache, where it listens."""

from __future__ import annotations

from pydantic import Field

from colm_serve.config.section import Count, Seconds, Section


class WorkerConfig(Section):
    """What prefill and decode workers have in common."""

    count: Count = 1
    num_cpus: float = Field(default=1.0, gt=0, description="what Ray reserves for one worker")
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: Count = 1
    kv_tokens: Count = 16384
    page_size: Count = 16
    max_request_s: Seconds = Field(
        default=3600.0, description="ends a call whose caller set no deadline, or a longer one"
    )
    host: str = "127.0.0.1"

    @property
    def num_pages(self) -> int:
        return -(-self.kv_tokens // self.page_size)
