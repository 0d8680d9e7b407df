"""What workers report about their load."""

from __future__ import annotations

from dataclasses import dataclass, field

from colm_serve.core.costs import PrefillCost, StepCost, TransferCost


@dataclass(frozen=True, slots=True)
class DecodeStatus:
    """A decode worker's load; `num_running[k - 1]` counts the rows at level k.

    They attend to `num_attended[k - 1]` tokens, all together. It reserves pages for a prompt and up
    to `expected_output_tokens` of output. Of `num_drafted` tokens drafted `num_accepted` held.
    `num_failed_rows` requests failed alone, in the midst of a batch, since it started.
    """

    worker_id: str
    epoch: int
    kv_identity: str
    num_levels: int
    max_rows: int
    num_waiting: int
    num_running: tuple[int, ...]
    num_free_pages: int
    num_pages: int
    page_size: int
    step_cost: StepCost
    prefill_tokens_per_s: float
    expected_output_tokens: int
    num_preemptions: int
    num_drafted: int
    num_accepted: int
    num_attended: tuple[int, ...] = ()
    num_failed_rows: int = 0
    transfer_cost: TransferCost = field(default_factory=TransferCost)


@dataclass(frozen=True, slots=True)
class PrefillStatus:
    """A prefill worker's load: `queued_s` is what its `num_queued_tokens` are predicted to take.

    Since it started it has computed `num_computed_tokens` of prompts and found
    `num_cached_tokens` in its prefix cache.
    """

    worker_id: str
    epoch: int
    kv_identity: str
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    queued_s: float
    cost: PrefillCost
    num_free_pages: int
    num_pages: int
    num_computed_tokens: int
    num_cached_tokens: int
