"""What each actor reserves from Ray, and how its process is set up: pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from colm_serve.config import ClusterConfig, WorkerConfig


class Role(Enum):
    """What an actor's process does."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


#: Large gRPC messages cost half as much when malloc keeps their memory.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024 * 1024),
    "MALLOC_TOP_PAD_": str(16 * 1024 * 1024),
}


@dataclass(frozen=True)
class Slot:
    """A place in the cluster that is always filled: a dead actor is replaced in its slot."""

    role: Role
    index: int
    bundle: int  # in its placement group
    num_cpus: float
    num_gpus: float
    num_threads: int
    variant: str = ""  # whose upper chains a decode worker holds

    @property
    def worker_id(self) -> str:
        return f"{self.role.value}-{self.index}"

    @property
    def resources(self) -> dict[str, float]:
        """The placement group's bundle."""
        bundle = {"CPU": self.num_cpus}
        if self.num_gpus:
            bundle["GPU"] = self.num_gpus
        return bundle

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the actor's process."""
        threads = str(self.num_threads)
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            **MALLOC,
        }


def slots_of(config: ClusterConfig) -> tuple[Slot, ...]:
    """Every slot of a cluster; the router's comes first."""
    return tuple(_slots(config))


def _slots(config: ClusterConfig) -> Iterator[Slot]:
    yield Slot(Role.ROUTER, 0, 0, num_cpus=1.0, num_gpus=0.0, num_threads=1)
    bundle = 1
    for role, room in _rooms(config).items():
        variants = ("", *config.variants) if role is Role.DECODE else ("",)
        for index, variant in enumerate(v for v in variants for _ in range(room.count)):
            yield Slot(role, index, bundle, room.num_cpus, room.num_gpus, room.num_threads, variant)
            bundle += 1


def further_slot(config: ClusterConfig, role: Role, index: int) -> Slot:
    """That of a worker which comes later, in a placement group of its own."""
    room = _rooms(config)[role]
    return Slot(role, index, 0, room.num_cpus, room.num_gpus, room.num_threads)


def max_cpus(config: ClusterConfig) -> float:
    """The most that the cluster reserves, whatever the planner makes of it.

    The places that it began with stay reserved, whoever has left them.
    """
    num_cpus = sum(slot.num_cpus for slot in slots_of(config))
    if config.planner.enabled:
        num_cpus += config.planner.max_prefill * config.prefill.num_cpus
        num_cpus += config.planner.max_decode * config.decode.num_cpus
    return num_cpus


def _rooms(config: ClusterConfig) -> dict[Role, WorkerConfig]:
    return {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
