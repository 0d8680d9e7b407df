"""What a policy is asked, and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.core import Member
from colm_serve.router.placing.latency_model import Prediction
from colm_serve.router.placing.snapshot import DecodeState


@dataclass(slots=True)
class RequestFacts:
    """What a policy may know of a request, which was received `age_s` ago.

    `refused_by` had no room for it a moment ago; at `failed_at` it broke off, so that these
    come last. One that `is_begun` has been at a worker, and is served late rather than not at all.
    It leaves some of the room to those of classes with more weight, where there are such:
    `heavier_tpot_s` is the strictest target of these, infinite if they have none.
    `own_targets` are those that the request itself names, rather than its class. Only workers of
    its `variant` can decode it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    min_level: int
    max_level: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    age_s: float = 0.0
    is_begun: bool = False
    heavier_tpot_s: float | None = None
    own_targets: frozenset[str] = frozenset()
    refused_by: frozenset[Member] = frozenset()
    failed_at: frozenset[Member] = frozenset()
    variant: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def num_attended(self) -> int:
        """Tokens that one of its steps attends to, on average."""
        return len(self.prompt) + self.max_tokens // 2

    def num_reserved_tokens(self, state: DecodeState) -> int:
        """What the decode worker reserves pages for at once."""
        return len(self.prompt) + min(self.max_tokens, state.status.expected_output_tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: a decode worker, prefill workers in order, a level."""

    decode: Member
    prefill: tuple[Member, ...]
    level: int
    prediction: Prediction
