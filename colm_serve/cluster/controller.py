"""The controller actor: keeps the fleet, starts standbys, follows the planner."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from colm_serve.cluster.fleet import Fleet
from colm_serve.cluster.news import News
from colm_serve.cluster.placement import Role
from colm_serve.cluster.scaling import scaling_of
from colm_serve.cluster.standbys import Standbys
from colm_serve.config import ClusterConfig
from colm_serve.core import Membership
from colm_serve.errors import ColmError
from colm_serve.router.actor import RouterAddresses
from colm_serve.router.planner import Plan, make_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterView:
    """What the controller knows of its cluster."""

    addresses: RouterAddresses
    membership: Membership
    num_restarts: int


class Controller:
    """One a cluster, itself a Ray actor; all methods run on its event loop."""

    def __init__(self, config: ClusterConfig) -> None:
        # Into the log file that Ray keeps for this process.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._config = config
        self._news = News()
        self._fleet = Fleet(config, self._news.tell)
        self._scaling = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> RouterAddresses:
        """Start every actor; returns when all serve; raises as `Fleet.start`."""
        await self._fleet.start()
        if self._config.standby.enabled:
            self._tasks.append(asyncio.create_task(Standbys(self._fleet, self._config.ray).run()))
        if self._config.planner.enabled:
            self._tasks.append(asyncio.create_task(self._plan_forever()))
        return self._fleet.addresses

    async def view(self) -> ClusterView:
        fleet = self._fleet
        return ClusterView(fleet.addresses, fleet.membership(), fleet.num_restarts)

    async def news(self, after: int) -> tuple[int, tuple[str, ...]]:
        """See `News.after`."""
        return self._news.after(after)

    async def plan(self) -> Plan | None:
        """Plan for the load of late and act on it; None while nothing is known of the costs."""
        demands, costs = await self._fleet.load()
        if costs is None:
            return None
        num_prefill, num_decode = self._counts()
        plan = make_plan(demands, costs, self._config.planner, num_prefill, num_decode)
        await self.follow(plan)
        return plan

    async def follow(self, plan: Plan) -> None:
        """Bring the numbers of workers to those of a plan, as far as Ray has places."""
        async with self._scaling:
            prefill, decode = map(self._fleet.slots, (Role.PREFILL, Role.DECODE))
            scaling = scaling_of(plan, prefill, decode)
            if scaling.is_change:
                self._news.tell(f"from {len(prefill)} and {len(decode)}: {plan.reason}")
            steps = (
                *(self._fleet.convert(slot) for slot in scaling.converted),
                *(self._fleet.add(role) for role in scaling.added),
                *(self._fleet.remove(slot) for slot in scaling.removed),
            )
            for result in await asyncio.gather(*steps, return_exceptions=True):
                if isinstance(result, ColmError):
                    self._news.tell(f"a worker count stays as it is: {result}")
                elif result is not None:
                    raise result

    async def stop(self) -> None:
        """Stop the router, then the workers, then give the resources back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fleet.stop()

    async def _plan_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.planner.interval_s)
            try:
                await self.plan()
            except ColmError as error:
                logger.warning("no plan: %s", error)

    def _counts(self) -> tuple[int, int]:
        return len(self._fleet.slots(Role.PREFILL)), len(self._fleet.slots(Role.DECODE))
