"""When standbys begin and end, against a fleet of plain values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from colm_serve.cluster.fleet import Fleet
from colm_serve.cluster.placement import Role, Slot
from colm_serve.cluster.standbys import Standbys
from colm_serve.config import RayConfig
from colm_serve.core import Member, WorkerKind
from colm_serve.errors import Unavailable

PREFILL = [Slot(Role.PREFILL, i, i, num_cpus=1.0, num_gpus=0.0, num_threads=1) for i in range(2)]
DECODE = Slot(Role.DECODE, 0, 2, num_cpus=1.0, num_gpus=0.0, num_threads=1)


class PlainFleet:
    """Two prefill workers, and a decode worker or none; `log` has what was done to standbys."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.standbys: dict[Slot, Member] = {}
        self.log: list[str] = []
        self.num_requests = 0
        self.broken: Slot | None = None
        self.decode = [DECODE]
        self._without_worker: Slot | None = None

    def set_decode(self, *, is_there: bool, slot: Slot = DECODE) -> None:
        self._without_worker = None if is_there else slot
        self.changed.set()

    def slots(self, role: Role) -> list[Slot]:
        return PREFILL if role is Role.PREFILL else self.decode

    def has_member(self, slot: Slot) -> bool:
        return slot is not self._without_worker

    async def start_standby(self, slot: Slot) -> None:
        if slot is self.broken:
            raise Unavailable("no room for the head")
        self.log.append(f"start {slot.worker_id}")
        name = slot.worker_id
        self.standbys[slot] = Member(WorkerKind.DECODE, name, "", 1, "kv", is_standby=True)

    async def stop_standby(self, slot: Slot) -> None:
        self.log.append(f"stop {slot.worker_id}")
        del self.standbys[slot]

    async def drain(self, member: Member) -> None:
        self.log.append(f"drain {member.worker_id}")

    async def undrain(self, member: Member) -> None:
        self.log.append(f"undrain {member.worker_id}")

    async def num_standby_requests(self, slot: Slot) -> int:
        return self.num_requests

    async def until(self, *entries: str) -> None:
        """Wait until all of these have been logged, and forget the log."""
        async with asyncio.timeout(5):
            while not set(entries) <= set(self.log):
                await asyncio.sleep(0.001)
        self.log.clear()


@asynccontextmanager
async def kept(fleet: PlainFleet, drain_s: float = 60.0) -> AsyncIterator[None]:
    config = RayConfig(health_interval_s=0.001, drain_s=drain_s)
    task = asyncio.create_task(Standbys(cast(Fleet, fleet), config).run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_they_begin_when_no_decode_worker_is_left_and_end_when_idle() -> None:
    fleet = PlainFleet()
    async with kept(fleet):
        fleet.set_decode(is_there=True)
        await asyncio.sleep(0.005)
        assert fleet.log == []
        fleet.set_decode(is_there=False)
        await fleet.until("start prefill-0", "start prefill-1")
        fleet.num_requests = 1
        fleet.set_decode(is_there=True)
        await fleet.until("drain prefill-0", "drain prefill-1")
        assert len(fleet.standbys) == 2, "they have texts to finish"
        fleet.num_requests = 0
        await fleet.until("stop prefill-0", "stop prefill-1")


async def test_a_variant_without_a_decode_worker_needs_them_too() -> None:
    fleet = PlainFleet()
    chat = replace(DECODE, index=1, variant="chat")
    fleet.decode = [DECODE, replace(DECODE, index=2), chat]
    async with kept(fleet):
        fleet.set_decode(is_there=False)
        await asyncio.sleep(0.005)
        assert fleet.log == [], "the model has another"
        fleet.set_decode(is_there=False, slot=chat)
        await fleet.until("start prefill-0", "start prefill-1")


async def test_texts_are_not_waited_for_longer_than_they_may_take() -> None:
    fleet = PlainFleet()
    async with kept(fleet, drain_s=0.01):
        fleet.num_requests = 1
        fleet.set_decode(is_there=False)
        await fleet.until("start prefill-0")
        fleet.set_decode(is_there=True)
        await fleet.until("stop prefill-0", "stop prefill-1")


async def test_they_go_on_when_the_decode_worker_is_lost_again() -> None:
    fleet = PlainFleet()
    async with kept(fleet):
        fleet.num_requests = 1
        for _ in range(2):
            fleet.set_decode(is_there=False)
            await fleet.until("undrain prefill-0" if fleet.standbys else "start prefill-0")
            fleet.set_decode(is_there=True)
            await fleet.until("drain prefill-0")
        assert len(fleet.standbys) == 2


async def test_one_that_cannot_begin_is_no_trouble_to_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = PlainFleet()
    fleet.broken = PREFILL[0]
    async with kept(fleet):
        fleet.set_decode(is_there=False)
        await fleet.until("start prefill-1")
    assert "prefill-0: no room for the head" in caplog.text
