"""What this router believes of one worker: its last status, and what has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from colm_serve.core import DecodeStatus, Member, PrefillStatus
from colm_serve.router.placing.outlook import Outlook
from colm_serve.router.placing.snapshot import DecodeState, PrefillState, Work

WorkerStatus = DecodeStatus | PrefillStatus


@dataclass(slots=True)
class WorkerRecord:
    """One member, and what this router has running there by request id.

    `number` is new for every process. `outstanding` requests are not in the status yet, but will be
    in the next one where the worker has admitted them, which is what it tells of each; `released`
    work has ended since, and still is; `remaining` is the status without it.
    """

    member: Member
    number: int
    status: WorkerStatus | None = None
    remaining: WorkerStatus | None = None
    is_reachable: bool = False
    is_draining: bool = False
    placed: dict[str, Work] = field(default_factory=dict)
    outstanding: dict[str, bool] = field(default_factory=dict)
    released: list[Work] = field(default_factory=list)
    outlook: Outlook | None = None

    def set_status(self, status: WorkerStatus, counted: frozenset[str]) -> None:
        """The worker answered; its status has the requests in `counted`."""
        self.status = self.remaining = status
        self.is_reachable = True
        for request_id in counted:
            self.outstanding.pop(request_id, None)
        self.released.clear()

    def place(self, request_id: str, work: Work) -> None:
        self.placed[request_id] = work
        self.outstanding[request_id] = False

    def move(self, request_id: str, level: int, *, is_pinned: bool) -> None:
        if (work := self.placed.get(request_id)) is not None:
            min_level = level if is_pinned else work.min_level
            self.placed[request_id] = replace(work, level=level, min_level=min_level)

    def admitted(self, request_id: str) -> None:
        if request_id in self.outstanding:
            self.outstanding[request_id] = True

    def counted(self) -> frozenset[str]:
        """The requests that a status asked for from now on will have counted."""
        return frozenset(i for i, is_admitted in self.outstanding.items() if is_admitted)

    def release(self, request_id: str) -> bool:
        """The request is over; returns whether it was there."""
        work = self.placed.pop(request_id, None)
        if work is None:
            return False
        if self.outstanding.pop(request_id, None) is None:
            self.released.append(work)
            self.remaining = _without(self.released, self.status)
        return True

    def state(self) -> DecodeState | PrefillState | None:
        """What policies see of it; None while it cannot be chosen."""
        if not self.is_reachable or self.is_draining:
            return None
        outstanding = tuple([self.placed[request_id] for request_id in self.outstanding])
        match self.remaining:
            case DecodeStatus() as status:
                placed = tuple(self.placed.values())
                targets = [work.tpot_s for work in placed if work.tpot_s is not None]
                tpot_s = min(targets, default=None)
                return DecodeState(self.member, status, outstanding, placed, tpot_s, self.outlook)
            case PrefillStatus() as status:
                num_tokens = sum([work.num_prompt_tokens for work in outstanding])
                return PrefillState(self.member, status, num_tokens)
        return None


def _without(released: Sequence[Work], status: WorkerStatus | None) -> WorkerStatus | None:
    """The status as it will be once the worker reports that this work has ended."""
    match status:
        case DecodeStatus():
            return _without_rows(released, status)
        case PrefillStatus():
            return _without_prompts(released, status)
    return None


def _without_rows(released: Sequence[Work], status: DecodeStatus) -> DecodeStatus:
    num_running, num_attended = list(status.num_running), list(status.num_attended)
    num_free_pages = status.num_free_pages
    for work in released:
        level = work.level - 1
        if level < len(num_attended):
            num_attended[level] -= num_attended[level] // max(1, num_running[level])
        num_running[level] = max(0, num_running[level] - 1)
        num_tokens = work.num_reserved_tokens(status.expected_output_tokens)
        num_free_pages += -(-num_tokens // status.page_size)
    return replace(
        status,
        num_running=tuple(num_running),
        num_attended=tuple(num_attended),
        num_free_pages=min(status.num_pages, num_free_pages),
    )


def _without_prompts(released: Sequence[Work], status: PrefillStatus) -> PrefillStatus:
    num_done = sum(work.num_prompt_tokens for work in released)
    done_s = sum(status.cost.seconds(0, work.num_prompt_tokens) for work in released)
    return replace(
        status,
        num_running=max(0, status.num_running - len(released)),
        num_queued_tokens=max(0, status.num_queued_tokens - num_done),
        queued_s=max(0.0, status.queued_s - done_s),
    )
