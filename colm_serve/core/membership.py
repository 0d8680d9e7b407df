"""Who is in the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WorkerKind(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Member:
    """A live worker. The epoch is new for every process, so a restart is never mistaken.

    A standby is a prefill worker's process that decodes too, at level 1, for as long as no other
    decode worker can. `variant` names the upper chains that a decode worker holds, "" for those
    of the cluster's own model; chain 1 is the same in all.
    """

    kind: WorkerKind
    worker_id: str
    address: str
    epoch: int
    kv_identity: str
    is_standby: bool = False
    variant: str = ""

    def __hash__(self) -> int:
        # Members are looked up a dozen times a request, and a string remembers its hash.
        return hash(self.worker_id)


@dataclass(frozen=True)
class Membership:
    """Who is in the cluster, as the controller last knew; a higher version replaces a lower.

    Those of the members that are `draining` take no new requests; what runs there goes on.
    """

    version: int = 0
    members: tuple[Member, ...] = field(default_factory=tuple)
    draining: frozenset[Member] = frozenset()

    def of_kind(self, kind: WorkerKind) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.kind is kind)
