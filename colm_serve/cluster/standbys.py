"""Prefill workers decode at level 1 while no decode worker is there: when they begin and end.

No worker of one variant of the model is none: another variant's cannot stand in for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from colm_serve.cluster.fleet import Fleet
from colm_serve.cluster.placement import Role, Slot
from colm_serve.config import RayConfig
from colm_serve.errors import ColmError

logger = logging.getLogger(__name__)


class Standbys:
    """Keeps a fleet's standbys.

    They end when a decode worker is back and the texts that they have taken over are through, or
    `drain_s` later: then those go on at the decode worker.
    """

    def __init__(self, fleet: Fleet, config: RayConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._end_at: dict[Slot, float] = {}

    async def run(self) -> None:
        """Act on every change of the fleet, until cancelled."""
        while True:
            with suppress(TimeoutError):
                # That a standby has become idle is no change of the fleet.
                interval_s = self._config.health_interval_s if self._fleet.standbys else None
                async with asyncio.timeout(interval_s):
                    await self._fleet.changed.wait()
            self._fleet.changed.clear()
            act = self._retire if self._has_decode() else self._start
            slots = filter(self._fleet.has_member, self._fleet.slots(Role.PREFILL))
            await asyncio.gather(*(self._try(act, slot) for slot in slots))

    def _has_decode(self) -> bool:
        """Whether every variant of the model has a decode worker."""
        slots = self._fleet.slots(Role.DECODE)
        served = {slot.variant for slot in slots if self._fleet.has_member(slot)}
        return served >= {"", *(slot.variant for slot in slots)}

    async def _try(self, act: Callable[[Slot], Awaitable[None]], slot: Slot) -> None:
        try:
            await act(slot)
        except ColmError as error:
            logger.warning("the standby of %s: %s", slot.worker_id, error)

    async def _start(self, slot: Slot) -> None:
        self._end_at.pop(slot, None)
        member = self._fleet.standbys.get(slot)
        if member is None:
            await self._fleet.start_standby(slot)
        else:
            await self._fleet.undrain(member)

    async def _retire(self, slot: Slot) -> None:
        member = self._fleet.standbys.get(slot)
        if member is None:
            return
        now = asyncio.get_running_loop().time()
        end_at = self._end_at.setdefault(slot, now + self._config.drain_s)
        await self._fleet.drain(member)
        if now >= end_at or not await self._fleet.num_standby_requests(slot):
            del self._end_at[slot]
            await self._fleet.stop_standby(slot)
