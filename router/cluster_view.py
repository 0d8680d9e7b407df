"""What this router believes of the workers: membership, last statuses, its own placements.

Belongs to one event loop; makes no calls itself (see `poller`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import count

from colm_serve.core import Member, Membership
from colm_serve.router.placing.facts import Placement
from colm_serve.router.placing.outlook import Outlook
from colm_serve.router.placing.placement import WorkerGroup
from colm_serve.router.placing.prefix_index import block_hashes
from colm_serve.router.placing.snapshot import ClusterSnapshot, DecodeState, PrefillState, Work
from colm_serve.router.placing.worker_record import WorkerRecord, WorkerStatus

logger = logging.getLogger(__name__)


class ClusterView:
    """The members, and the snapshots that policies decide on.

    `block_tokens` is the page size of the workers, whose caches hold whole pages of a prompt.
    Prefill workers and standbys are those of every variant of the model.
    """

    def __init__(self, kv_identity: str, block_tokens: int = 16, seed: int = 0) -> None:
        self._kv_identity = kv_identity
        self._block_tokens = block_tokens
        self._draw = random.Random(seed).randrange
        self._version: int | None = None
        self._records: dict[Member, WorkerRecord] = {}
        self._numbers = count()
        self._decode: defaultdict[str, WorkerGroup[DecodeState]] = defaultdict(
            lambda: WorkerGroup(block_tokens)
        )
        self._prefill: WorkerGroup[PrefillState] = WorkerGroup(block_tokens)
        self._hashed: tuple[Sequence[int], str, tuple[int, ...]] = ((), "", ())
        self._foreign: frozenset[Member] = frozenset()
        self._changed: asyncio.Event | None = None  # somebody waits for it

    @property
    def version(self) -> int:
        """Version of the membership in use; 0 before there is one."""
        return self._version or 0

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        return tuple(self._records.values())

    def num_decode(self, variant: str = "") -> int:
        """Decode workers of a variant that can be chosen."""
        return len(self._decode[variant])

    def has_reachable_decode(self) -> bool:
        """Whether any worker can decode, a standby too."""
        return any(map(len, self._decode.values())) or bool(self.standbys((), "").decode)

    def change(self) -> asyncio.Event:
        """Set at the next change of anything a policy could decide otherwise on."""
        if self._changed is None:
            self._changed = asyncio.Event()
        return self._changed

    def announce(self) -> None:
        """Let those who wait for a change decide again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

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
        before, self._records = self._records, {}
        for member in membership.members:
            if member not in foreign:
                record = before.pop(member, None) or WorkerRecord(member, next(self._numbers))
                record.is_draining = member in membership.draining
                self._records[member] = record
                self._rank(record)
        for record in before.values():
            self._decode[record.member.variant].leave(record.number)
            self._prefill.leave(record.number)
        self.announce()
        return True

    def counted(self, member: Member) -> frozenset[str]:
        """The requests that a status asked for from now on will have counted."""
        record = self._records.get(member)
        return frozenset() if record is None else record.counted()

    def set_status(self, member: Member, status: WorkerStatus, counted: frozenset[str]) -> None:
        """A worker answered. One that is not the member's process, or not its weights, is gone."""
        record = self._records.get(member)
        if record is None:
            return
        if (status.epoch, status.kv_identity) != (member.epoch, member.kv_identity):
            self.set_unreachable(member)
            return
        record.set_status(status, counted)
        self._rank(record)
        self.announce()

    def set_unreachable(self, member: Member) -> None:
        """A call to the worker failed; it is not used until it answers a poll."""
        record = self._records.get(member)
        if record is not None and record.is_reachable:
            record.is_reachable = False
            logger.warning("%s worker %s is unreachable", member.kind.value, member.worker_id)
            self._rank(record)
            self.announce()

    def place(
        self,
        request_id: str,
        placement: Placement,
        work: Work,
        prompt: Sequence[int] = (),
        cache_salt: str = "",
    ) -> None:
        """Count a request against its workers from now, before their statuses can."""
        for record in self._records_of(placement):
            record.place(request_id, work)
            self._rank(record)
            self._cached(record, prompt, cache_salt)

    def status_of(self, member: Member) -> WorkerStatus | None:
        """What the worker last said of itself."""
        record = self._records.get(member)
        return None if record is None else record.status

    def move(self, request_id: str, member: Member, level: int, *, is_pinned: bool = False) -> None:
        """A request goes to another level; if pinned there, it is not to be moved again."""
        if (record := self._records.get(member)) is not None:
            record.move(request_id, level, is_pinned=is_pinned)
            self._rank(record)

    def set_outlook(self, member: Member, outlook: Outlook | None) -> None:
        """What the requests at a decode worker leave to newcomers, as far as that is known."""
        record = self._records.get(member)
        if record is not None and not record.outlook is outlook is None:
            record.outlook = outlook
            self._rank(record)

    def admitted(self, request_id: str, placement: Placement) -> None:
        """The workers know of the request."""
        for record in self._records_of(placement):
            record.admitted(request_id)

    def prefilled(self, request_id: str, placement: Placement) -> None:
        """The request has its first token, so that its prefill worker is done with it."""
        for member in placement.prefill[:1]:
            record = self._records.get(member)
            if record is not None and record.release(request_id):
                self._rank(record)

    def release(self, request_id: str, placement: Placement) -> None:
        """The request is over at its workers."""
        for record in self._records_of(placement):
            if record.release(request_id):
                self._rank(record)
        self.announce()

    def cached(self, member: Member, tokens: Sequence[int], cache_salt: str) -> None:
        """A worker has the keys and values of a sequence, or is about to have them."""
        if (record := self._records.get(member)) is not None:
            self._cached(record, tokens, cache_salt)

    def snapshot(self) -> ClusterSnapshot:
        """All the workers that can be chosen, as they are now."""
        states = [r.state() for r in self._records.values() if not r.member.is_standby]
        return ClusterSnapshot(
            decode=tuple(state for state in states if isinstance(state, DecodeState)),
            prefill=tuple(state for state in states if isinstance(state, PrefillState)),
        )

    def candidates(
        self,
        prompt: Sequence[int],
        cache_salt: str,
        variant: str = "",
        pace: int | None = None,
    ) -> ClusterSnapshot:
        """The workers to choose among for a prompt; see `placement`."""
        hashes = self._hashes(prompt, cache_salt)
        return ClusterSnapshot(
            decode=self._decode[variant].candidates(hashes, self._draw, pace),
            prefill=self._prefill.candidates(hashes, self._draw),
        )

    def standbys(self, prompt: Sequence[int], cache_salt: str) -> ClusterSnapshot:
        """The prefill workers that decode while nobody else does, all of them."""
        records = (r for r in self._records.values() if r.member.is_standby)
        states = (record.state() for record in records)
        return ClusterSnapshot(
            decode=tuple(state for state in states if isinstance(state, DecodeState)),
            prefill=self._prefill.candidates(self._hashes(prompt, cache_salt), self._draw),
        )

    def roomiest(
        self, prompt: Sequence[int], cache_salt: str, variant: str = ""
    ) -> ClusterSnapshot:
        """The decode workers with the most room: none has more, as far as this router knows."""
        hashes = self._hashes(prompt, cache_salt)
        return ClusterSnapshot(
            decode=self._decode[variant].roomiest(hashes),
            prefill=self._prefill.candidates(hashes, self._draw),
        )

    def _records_of(self, placement: Placement) -> list[WorkerRecord]:
        """Of the decode worker and the first prefill worker, those that are still members."""
        found = map(self._records.get, (placement.decode, *placement.prefill[:1]))
        return [record for record in found if record is not None]

    def _cached(self, record: WorkerRecord, tokens: Sequence[int], cache_salt: str) -> None:
        hashes = self._hashes(tokens, cache_salt)
        self._decode[record.member.variant].cached(record.number, hashes)
        self._prefill.cached(record.number, hashes)

    def _rank(self, record: WorkerRecord) -> None:
        """Take note of a worker after anything about it has changed."""
        state = None if record.member.is_standby else record.state()
        decode = self._decode[record.member.variant]
        if state is None:
            decode.drop(record.number)
            self._prefill.drop(record.number)
        elif isinstance(state, DecodeState):
            status = state.status
            num_rows = sum(status.num_running) + status.num_waiting + len(state.outstanding)
            load = num_rows / status.max_rows
            decode.set(record.number, state, load, state.num_free_pages, state.pace)
        else:
            self._prefill.set(record.number, state, state.queue_s, state.status.num_free_pages)

    def _hashes(self, tokens: Sequence[int], cache_salt: str) -> tuple[int, ...]:
        """Made once for a prompt that is looked up and then placed."""
        if self._hashed[:2] != (tokens, cache_salt):
            hashes = block_hashes(tokens, self._block_tokens, cache_salt)
            self._hashed = (tokens, cache_salt, hashes)
        return self._hashed[2]
