"""What the cluster serves and how its workers are, as clients see it."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.core import DecodeStatus
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.placing.worker_record import WorkerRecord


@dataclass(frozen=True)
class WorkerState:
    """One worker; the counts are those of its last status, 0 before there is one."""

    kind: str
    worker_id: str
    address: str
    epoch: int
    is_reachable: bool
    num_running: int
    num_waiting: int
    num_free_pages: int
    num_pages: int
    num_preemptions: int
    variant: str = ""


@dataclass(frozen=True)
class ClusterStatus:
    model: str
    num_levels: int
    membership_version: int
    workers: tuple[WorkerState, ...]


def cluster_status(model: ModelFacts, view: ClusterView) -> ClusterStatus:
    return ClusterStatus(
        model=model.name,
        num_levels=model.num_levels,
        membership_version=view.version,
        workers=tuple(_worker_state(record) for record in view.records),
    )


def _worker_state(record: WorkerRecord) -> WorkerState:
    member, status = record.member, record.status
    if isinstance(status, DecodeStatus):
        num_running, num_preemptions = sum(status.num_running), status.num_preemptions
    else:
        num_preemptions = 0
        num_running = 0 if status is None else status.num_running
    return WorkerState(
        kind="standby" if member.is_standby else member.kind.value,
        worker_id=member.worker_id,
        address=member.address,
        epoch=member.epoch,
        is_reachable=record.is_reachable,
        num_running=num_running,
        num_waiting=0 if status is None else status.num_waiting,
        num_free_pages=0 if status is None else status.num_free_pages,
        num_pages=0 if status is None else status.num_pages,
        num_preemptions=num_preemptions,
        variant=member.variant,
    )
