"""What this router believes of one worker: its last status, and what has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from colm_serve.core import DecodeStatus, Member, PrefillStatus
from colm_serve.router.placing.snapshot import DecodeState, PrefillState, Work

WorkerStatus = DecodeStatus | PrefillStatus


@dataclass
class _Placed:
    work: Work
    is_counted: bool = False  # the worker has admitted it, so its next status has it


@dataclass
class WorkerRecord:
    """One member, and what this router has running there by request id.

    `number` is new for every process. `outstanding` requests are not in the status yet; `released`
    work has ended since, and still is.
    """

    member: Member
    number: int
    status: WorkerStatus | None = None
    is_reachable: bool = False
    is_draining: bool = False
    placed: dict[str, _Placed] = field(default_factory=dict)
    outstanding: set[str] = field(default_factory=set)
    released: list[Work] = field(default_factory=list)

    def set_status(self, status: WorkerStatus, counted: frozenset[str]) -> None:
        """The worker answered; its status has the requests in `counted`."""
        self.status = status
        self.is_reachable = True
        self.outstanding -= counted
        self.released.clear()

    def place(self, request_id: str, work: Work) -> None:
        self.placed[request_id] = _Placed(work)
        self.outstanding.add(request_id)

    def move(self, request_id: str, level: int, *, is_pinned: bool) -> None:
        if (placed := self.placed.get(request_id)) is not None:
            min_level = level if is_pinned else placed.work.min_level
            placed.work = replace(placed.work, level=level, min_level=min_level)

    def admitted(self, request_id: str) -> None:
        if request_id in self.placed:
            self.placed[request_id].is_counted = True

    def counted(self) -> frozenset[str]:
        """The requests that a status asked for from now on will have counted."""
        return frozenset(i for i in self.outstanding if self.placed[i].is_counted)

    def release(self, request_id: str) -> None:
        placed = self.placed.pop(request_id, None)
        if placed is not None and request_id not in self.outstanding:
            self.released.append(placed.work)
        self.outstanding.discard(request_id)

    def state(self) -> DecodeState | PrefillState | None:
        """What policies see of it; None while it cannot be chosen."""
        if not self.is_reachable or self.is_draining:
            return None
        match self.status:
            case DecodeStatus() as status:
                return self._decode_state(status)
            case PrefillStatus() as status:
                num_tokens = sum(work.num_prompt_tokens for work in self._outstanding_work())
                return PrefillState(
                    self.member, _without_prompts(self.released, status), num_tokens
                )
        return None

    def _decode_state(self, status: DecodeStatus) -> DecodeState:
        targets = [p.work.tpot_s for p in self.placed.values() if p.work.tpot_s is not None]
        return DecodeState(
            member=self.member,
            status=_without(self.released, status),
            outstanding=self._outstanding_work(),
            placed=tuple(placed.work for placed in self.placed.values()),
            tpot_s=min(targets, default=None),
        )

    def _outstanding_work(self) -> tuple[Work, ...]:
        return tuple(self.placed[request_id].work for request_id in sorted(self.outstanding))


def _without(released: Sequence[Work], status: DecodeStatus) -> DecodeStatus:
    """The status as it will be once the worker reports that this work has ended."""
    if not released:
        return status
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
    """The status without prompts that have been computed since."""
    if not released:
        return status
    num_done = sum(work.num_prompt_tokens for work in released)
    done_s = sum(status.cost.seconds(0, work.num_prompt_tokens) for work in released)
    return replace(
        status,
        num_running=max(0, status.num_running - len(released)),
        num_queued_tokens=max(0, status.num_queued_tokens - num_done),
        queued_s=max(0.0, status.queued_s - done_s),
    )
