"""What the router knows of the workers at one moment; what policies decide on."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.core import DecodeStatus, Member, PrefillStatus


@dataclass(frozen=True)
class Work:
    """One request that this router has placed on a worker; it may be moved to `min_level`."""

    level: int
    num_prompt_tokens: int
    max_tokens: int
    tpot_s: float | None = None
    min_level: int = 1

    def num_reserved_tokens(self, expected_output_tokens: int) -> int:
        """What a worker that expects so much output reserves pages for."""
        return self.num_prompt_tokens + min(self.max_tokens, expected_output_tokens)


@dataclass(frozen=True)
class DecodeState:
    """A decode worker. `placed` is what this router has there, `outstanding` what of it was placed
    since and is not in `status` yet.

    `tpot_s` is the strictest target among the requests that this router runs there.
    `num_matched_tokens` is how much of the prompt to be placed the router believes cached there.
    """

    member: Member
    status: DecodeStatus
    outstanding: tuple[Work, ...] = ()
    placed: tuple[Work, ...] = ()
    tpot_s: float | None = None
    num_matched_tokens: int = 0


@dataclass(frozen=True)
class PrefillState:
    """A prefill worker; `num_outstanding_tokens` were sent there and are not in `status` yet.

    `num_matched_tokens` is how much of the prompt to be placed the router believes cached there.
    """

    member: Member
    status: PrefillStatus
    num_outstanding_tokens: int = 0
    num_matched_tokens: int = 0


@dataclass(frozen=True)
class ClusterSnapshot:
    """The workers that answered their last call; all of them hold the model's weights."""

    decode: tuple[DecodeState, ...] = ()
    prefill: tuple[PrefillState, ...] = ()
