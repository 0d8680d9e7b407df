"""What this router believes of the workers: membership, last statuses, its own placements.

Belongs to one event loop; makes no calls itself (see `poller`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from colm_serve.core import DecodeStatus, Member, Membership, PrefillStatus, WorkerKind
from colm_serve.router.policy import Placement
from colm_serve.router.snapshot import ClusterSnapshot, DecodeState, PrefillState, Work

logger = logging.getLogger(__name__)

WorkerStatus = DecodeStatus | PrefillStatus


@dataclass
class _Placed:
    work: Work
    is_counted: bool = False  # the worker has admitted it, so its next status has it


@dataclass
class WorkerRecord:
    """One member: its last status, and what this router has running there by request id."""

    member: Member
    status: WorkerStatus | None = None
    is_reachable: bool = False
    placed: dict[str, _Placed] = field(default_factory=dict)
    outstanding: set[str] = field(default_factory=set)

    def outstanding_work(self) -> tuple[Work, ...]:
        return tuple(self.placed[request_id].work for request_id in sorted(self.outstanding))


class ClusterView:
    """The members, and the snapshot that policies decide on."""

    def __init__(self, kv_identity: str) -> None:
        self._kv_identity = kv_identity
        self._version: int | None = None
        self._records: dict[Member, WorkerRecord] = {}
        self._foreign: frozenset[Member] = frozenset()
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        """Version of the membership in use; 0 before there is one."""
        return self._version or 0

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        return tuple(self._records.values())

    def change(self) -> asyncio.Event:
        """Set at the next change of anything a policy could decide otherwise on."""
        return self._changed

    def apply(self, membership: Membership) -> bool:
        """Use a membership if it is newer than the one in use; returns whether it is."""
        if self._version is not None and membership.version <= self._version:
            return False
        self._version = membership.version
        foreign = frozenset(m for m in membership.members if m.kv_identity != self._kv_identity)
        for member in foreign - self._foreign:
            logger.error(
                "worker %s at %s holds other weights (KV identity %s, not %s): it is not used",
                *(member.worker_id, member.address, member.kv_identity, self._kv_identity),
            )
        self._foreign = foreign
        own = (member for member in membership.members if member not in foreign)
        self._records = {m: self._records.get(m) or WorkerRecord(m) for m in own}
        self._announce()
        return True

    def counted(self, member: Member) -> frozenset[str]:
        """The requests that a status asked for from now on will have counted."""
        record = self._records.get(member)
        if record is None:
            return frozenset()
        return frozenset(i for i in record.outstanding if record.placed[i].is_counted)

    def set_status(self, member: Member, status: WorkerStatus, counted: frozenset[str]) -> None:
        """A worker answered. One that is not the member's process, or not its weights, is gone."""
        record = self._records.get(member)
        if record is None:
            return
        if (status.epoch, status.kv_identity) != (member.epoch, member.kv_identity):
            self.set_unreachable(member)
            return
        record.status = status
        record.is_reachable = True
        record.outstanding -= counted
        self._announce()

    def set_unreachable(self, member: Member) -> None:
        """A call to the worker failed; it is not used until it answers a poll."""
        record = self._records.get(member)
        if record is not None and record.is_reachable:
            record.is_reachable = False
            logger.warning("%s worker %s is unreachable", member.kind.value, member.worker_id)
            self._announce()

    def place(self, request_id: str, placement: Placement, work: Work) -> None:
        """Count a request against its workers from now, before their statuses can."""
        for member in (placement.decode, *placement.prefill[:1]):
            if (record := self._records.get(member)) is not None:
                record.placed[request_id] = _Placed(work)
                record.outstanding.add(request_id)

    def admitted(self, request_id: str, placement: Placement) -> None:
        """The workers know of the request."""
        for member in (placement.decode, *placement.prefill[:1]):
            record = self._records.get(member)
            if record is not None and request_id in record.placed:
                record.placed[request_id].is_counted = True

    def release(self, request_id: str, placement: Placement) -> None:
        """The request is over at its workers."""
        for member in (placement.decode, *placement.prefill[:1]):
            if (record := self._records.get(member)) is not None:
                record.placed.pop(request_id, None)
                record.outstanding.discard(request_id)

    def snapshot(self) -> ClusterSnapshot:
        """The reachable workers as they are now."""
        reachable = [r for r in self._records.values() if r.is_reachable]
        return ClusterSnapshot(
            decode=tuple(
                _decode_state(r, r.status) for r in reachable if isinstance(r.status, DecodeStatus)
            ),
            prefill=tuple(
                _prefill_state(r, r.status)
                for r in reachable
                if isinstance(r.status, PrefillStatus)
            ),
        )

    def has_reachable_decode(self) -> bool:
        return any(
            r.is_reachable and r.member.kind is WorkerKind.DECODE for r in self._records.values()
        )

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _decode_state(record: WorkerRecord, status: DecodeStatus) -> DecodeState:
    targets = [p.work.tpot_s for p in record.placed.values() if p.work.tpot_s is not None]
    return DecodeState(
        member=record.member,
        status=status,
        outstanding=record.outstanding_work(),
        tpot_s=min(targets, default=None),
    )


def _prefill_state(record: WorkerRecord, status: PrefillStatus) -> PrefillState:
    return PrefillState(
        member=record.member,
        status=status,
        num_outstanding_tokens=sum(w.num_prompt_tokens for w in record.outstanding_work()),
    )
