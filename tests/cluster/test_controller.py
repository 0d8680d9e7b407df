"""The controller asks, plans and acts over and over, against a fleet of plain values."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import pytest

from colm_serve.cluster.controller import Controller
from colm_serve.cluster.fleet import Fleet
from colm_serve.cluster.placement import Role, Slot
from colm_serve.config import ClusterConfig
from colm_serve.core import PrefillCost, StepCost
from colm_serve.errors import ColmError, Unavailable
from colm_serve.router.planner import Demand, WorkerCosts

COSTS = WorkerCosts(
    prefill_cost=PrefillCost(0.0, 0.001, 0.0, chunk_tokens=512),
    step_cost=StepCost((0.01,), (0.001,)),
    max_rows=10,
    num_levels=1,
)
BUSY = Demand(
    requests_per_s=20.0,
    prompt_tokens=100.0,
    computed_tokens=100.0,
    output_tokens=100.0,
    min_level=1,
    max_level=1,
)


class PlainFleet:
    """As many workers of each kind as have been asked for; `answers` are the router's."""

    def __init__(self, *answers: tuple[tuple[Demand, ...], WorkerCosts | None] | ColmError) -> None:
        self.num = {Role.PREFILL: 1, Role.DECODE: 1}
        self.has_answered = asyncio.Event()
        self.full: Role | None = None
        self._answers = list(answers)

    def slots(self, role: Role) -> list[Slot]:
        return [
            Slot(role, i, i, num_cpus=1.0, num_gpus=0.0, num_threads=1)
            for i in range(self.num[role])
        ]

    async def load(self) -> tuple[tuple[Demand, ...], WorkerCosts | None]:
        if not self._answers:
            self.has_answered.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, ColmError):
            raise answer
        return answer

    async def add(self, role: Role) -> None:
        if role is self.full:
            raise Unavailable(f"no place for a {role.value} worker")
        self.num[role] += 1

    async def remove(self, slot: Slot) -> None:
        self.num[slot.role] -= 1

    async def convert(self, slot: Slot) -> None:
        await self.remove(slot)
        await self.add(Role.DECODE)


async def run(fleet: PlainFleet) -> None:
    """Let a controller plan until the router's answers are used up."""
    planner = {"enabled": True, "interval_s": 0.001}
    config = ClusterConfig.model_validate({"model": "m", "planner": planner})
    controller = Controller(config)
    controller._fleet = cast(Fleet, fleet)
    task = asyncio.create_task(controller._plan_forever())
    async with asyncio.timeout(5):
        await fleet.has_answered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_counts_follow_the_load_up_and_down() -> None:
    fleet = PlainFleet(((BUSY,), COSTS))
    await run(fleet)
    # 2000 tokens/s either way: 2 workers' work of prefill, 3.8 of decode.
    assert fleet.num == {Role.PREFILL: 3, Role.DECODE: 5}
    fleet._answers, fleet.has_answered = [((), COSTS)], asyncio.Event()
    await run(fleet)
    assert fleet.num == {Role.PREFILL: 1, Role.DECODE: 1}


async def test_without_measurements_or_a_router_counts_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = PlainFleet(((BUSY,), None), Unavailable("router-0 is gone"))
    await run(fleet)
    assert fleet.num == {Role.PREFILL: 1, Role.DECODE: 1}
    assert "no plan: router-0 is gone" in caplog.text


async def test_a_worker_that_has_no_place_is_no_trouble_to_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = PlainFleet(((BUSY,), COSTS), ((BUSY,), COSTS))
    fleet.full = Role.DECODE
    caplog.set_level(logging.INFO)
    await run(fleet)
    assert fleet.num == {Role.PREFILL: 3, Role.DECODE: 1}
    assert "no place for a decode worker" in caplog.text
    assert "3 prefill and 5 decode workers" in caplog.text
