"""What the router knows of the workers at one moment; what policies decide on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from colm_serve.core import DecodeStatus, Member, PrefillStatus
from colm_serve.router.placing.load import Load, TokenTimes, Work

__all__ = ["ClusterSnapshot", "DecodeState", "PrefillState", "Work"]


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

    @cached_property
    def load(self) -> Load:
        """By this router's own account, unless others have requests there too."""
        status = self.status
        num_there = sum(status.num_running) + status.num_waiting + len(self.outstanding)
        if num_there <= len(self.placed):
            return Load.of_work(self.placed, status.num_levels)
        sent = Load.of_work(self.outstanding, status.num_levels)
        return Load.of_status(status).plus(sent)

    @cached_property
    def times(self) -> TokenTimes:
        """What tokens take as things are."""
        return TokenTimes(self.load, self.status.step_cost, self.status.max_rows)

    @cached_property
    def lowered_times(self) -> TokenTimes:
        """What they take once all that this router has there runs at the lowest level it may."""
        load = self.load.lowered(self.placed)
        return TokenTimes(load, self.status.step_cost, self.status.max_rows)

    def for_prompt(self, num_matched_tokens: int) -> DecodeState:
        """The same for a prompt of which so many tokens are believed to be cached there."""
        state = replace(self, num_matched_tokens=num_matched_tokens)
        # These do not depend on the prompt, and are worked out once for many.
        state.__dict__.update(load=self.load, times=self.times)
        return state


@dataclass(frozen=True)
class PrefillState:
    """A prefill worker; `num_outstanding_tokens` were sent there and are not in `status` yet.

    `num_matched_tokens` is how much of the prompt to be placed the router believes cached there.
    """

    member: Member
    status: PrefillStatus
    num_outstanding_tokens: int = 0
    num_matched_tokens: int = 0

    def for_prompt(self, num_matched_tokens: int) -> PrefillState:
        """The same for a prompt of which so many tokens are believed to be cached there."""
        return replace(self, num_matched_tokens=num_matched_tokens)


@dataclass(frozen=True)
class ClusterSnapshot:
    """The workers that answered their last call; all of them hold the model's weights."""

    decode: tuple[DecodeState, ...] = ()
    prefill: tuple[PrefillState, ...] = ()
