"""What the router knows of the workers at one moment; what policies decide on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from colm_serve.core import DecodeStatus, Member, PrefillStatus
from colm_serve.router.placing.lazy import lazy
from colm_serve.router.placing.load import Load, TokenTimes, Work
from colm_serve.router.placing.outlook import Outlook
from colm_serve.router.placing.pace import pace_of

__all__ = ["ClusterSnapshot", "DecodeState", "PrefillState", "Work"]


State = TypeVar("State", "DecodeState", "PrefillState")


# States are not frozen: one is made at each change of a worker, and in that is most of its cost.
@dataclass
class DecodeState:
    """A decode worker. `placed` is what this router has there, `outstanding` what of it was placed
    since and is not in `status` yet.

    `tpot_s` is the strictest target among the requests that this router runs there, and `outlook`
    what these leave to newcomers, where that is known.
    `num_matched_tokens` is how much of the prompt to be placed the router believes cached there.
    """

    member: Member
    status: DecodeStatus
    outstanding: tuple[Work, ...] = ()
    placed: tuple[Work, ...] = ()
    tpot_s: float | None = None
    outlook: Outlook | None = None
    num_matched_tokens: int = 0

    @lazy
    def pace(self) -> int | None:
        """Of the fastest that this router has there; None: it has nothing there."""
        return pace_of(self.tpot_s) if self.placed else None

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.status.page_size)

    @lazy
    def num_free_pages(self) -> int:
        """Free pages once the work on its way has its own."""
        expected = self.status.expected_output_tokens
        taken = [self.pages_for(work.num_reserved_tokens(expected)) for work in self.outstanding]
        return max(0, self.status.num_free_pages - sum(taken))

    @lazy
    def load(self) -> Load:
        """By this router's own account, unless others have requests there too."""
        status = self.status
        num_there = sum(status.num_running) + status.num_waiting + len(self.outstanding)
        if num_there <= len(self.placed):
            return Load.of_work(self.placed, status.num_levels)
        sent = Load.of_work(self.outstanding, status.num_levels)
        return Load.of_status(status).plus(sent)

    @lazy
    def times(self) -> TokenTimes:
        """What tokens take as things are."""
        return TokenTimes(self.load, self.status.step_cost, self.status.max_rows)

    @lazy
    def lowered_times(self) -> TokenTimes:
        """What they take once all that this router has there runs at the lowest level it may."""
        if not self.placed:
            return self.times
        load = self.load.lowered(self.placed)
        return TokenTimes(load, self.status.step_cost, self.status.max_rows)

    def for_prompt(self, num_matched_tokens: int) -> DecodeState:
        """The same for a prompt of which so many tokens are believed to be cached there."""
        # These do not depend on the prompt, and are worked out once for many.
        worked_out = {
            "times": self.times,
            "lowered_times": self.lowered_times,
            "num_free_pages": self.num_free_pages,
        }
        return _copy(self, **worked_out, num_matched_tokens=num_matched_tokens)


@dataclass
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
        queue_s = self.queue_s
        return _copy(self, queue_s=queue_s, num_matched_tokens=num_matched_tokens)

    @lazy
    def queue_s(self) -> float:
        """Seconds of work there; what is not in its status is taken for short prompts."""
        cost = self.status.cost
        each_s = cost.token_s + cost.pass_s / max(1, cost.chunk_tokens)
        return self.status.queued_s + each_s * self.num_outstanding_tokens


@dataclass(frozen=True)
class ClusterSnapshot:
    """The workers that answered their last call; all of them hold the model's weights."""

    decode: tuple[DecodeState, ...] = ()
    prefill: tuple[PrefillState, ...] = ()


def _copy(state: State, **changes: Any) -> State:
    """As `dataclasses.replace`, in a fraction of its time: a decision makes ten of them."""
    copy = object.__new__(type(state))
    copy.__dict__.update(state.__dict__, **changes)
    return copy
