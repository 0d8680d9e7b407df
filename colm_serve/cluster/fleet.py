"""The cluster's slots: fill them, replace the dead, let workers go, and tell the router.

Ray places and ends processes; requests and KV never pass through here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from colm_serve.cluster.actors import Actors
from colm_serve.cluster.placement import Role, Slot, further_slot, slots_of
from colm_serve.cluster.places import Places
from colm_serve.cluster.supervisors import Supervisors
from colm_serve.config import ClusterConfig
from colm_serve.core import Member, Membership
from colm_serve.errors import ColmError, DeadlineExceeded, Unavailable
from colm_serve.router.actor import RouterAddresses
from colm_serve.router.planner import Demand, WorkerCosts

logger = logging.getLogger(__name__)

_IDLE_POLL_S = 0.1


class Fleet:
    """Every slot, its actor and the members there; belongs to one event loop.

    `changed` is set whenever a worker has come, gone or begun to drain.
    """

    def __init__(self, config: ClusterConfig, tell: Callable[[str], None]) -> None:
        """`tell` hears of everything that is done to a worker, in a line each."""
        self._config = config
        self._slots = list(slots_of(config))
        self._num_made = Counter(slot.role for slot in self._slots)
        self._places = Places(config.ray.start_timeout_s)
        self._actors = Actors()
        self._members: dict[Slot, Member] = {}
        self._standbys: dict[Slot, Member] = {}
        self._draining: set[Member] = set()
        self._supervisors = Supervisors(
            config.ray,
            self._actors,
            fill=self._fill,
            evict=self._evict,
            catch_up=self._catch_up,
            tell=tell,
        )
        self._tell = tell
        self._version = 0
        self._addresses: RouterAddresses | None = None
        self.changed = asyncio.Event()

    async def start(self) -> None:
        """Start every actor; returns when all serve.

        Raises:
            Unavailable: Ray has not the resources, or an actor did not come up in time.
            ColmError: an actor refused to start, with its reason.
        """
        await self._places.reserve(self._slots)
        # The router last: it is told of every worker before it opens its doors.
        workers = [slot for slot in self._slots if slot.role is not Role.ROUTER]
        await asyncio.gather(*(self._fill(slot) for slot in workers))
        await self._fill(self.router)
        for slot in self._slots:
            self._supervisors.watch(slot)

    async def stop(self) -> None:
        """Stop the router, then the workers, then give the resources back."""
        await asyncio.gather(*(self._supervisors.leave_alone(slot) for slot in self._slots))
        if self.router in self._actors:
            await self._actors.end(self.router)
        await asyncio.gather(*(self._actors.end(slot) for slot in self._actors.slots))
        self._places.close()

    @property
    def num_restarts(self) -> int:
        """Actors that were replaced, or were to be."""
        return self._supervisors.num_restarts

    @property
    def addresses(self) -> RouterAddresses:
        assert self._addresses is not None, "start comes first"
        return self._addresses

    @property
    def router(self) -> Slot:
        return next(slot for slot in self._slots if slot.role is Role.ROUTER)

    @property
    def standbys(self) -> dict[Slot, Member]:
        """The prefill workers that decode too."""
        return dict(self._standbys)

    def membership(self) -> Membership:
        members = (*(self._members[s] for s in self._slots if s in self._members),)
        standbys = tuple(self._standbys.values())
        return Membership(self._version, members + standbys, frozenset(self._draining))

    def slots(self, role: Role) -> list[Slot]:
        """Those that are to stay, oldest first, with a member or without."""
        draining = {slot for slot, m in self._members.items() if m in self._draining}
        return [s for s in self._slots if s.role is role and s not in draining]

    def has_member(self, slot: Slot) -> bool:
        return slot in self._members

    async def load(self) -> tuple[tuple[Demand, ...], WorkerCosts | None]:
        """What a planner decides on, as the router knows it.

        Raises:
            Unavailable: it is gone, or does not answer in time.
            ColmError: what it raised.
        """
        demands, costs = await self._actors.call(self.router, "load")
        return demands, costs

    async def add(self, role: Role) -> None:
        """A further worker, in a place that another has left or a new one; raises as `start`."""
        slot = further_slot(self._config, role, self._next_index(role))
        slot = await self._places.reserve_further(slot)
        self._slots.append(slot)
        try:
            await self._fill(slot)
        except ColmError:
            await self._forget(slot)
            raise
        self._supervisors.watch(slot)

    async def remove(self, slot: Slot) -> None:
        """Let a worker end what it has, for as long as `ray.drain_s`, and give its place back."""
        await self._supervisors.leave_alone(slot)
        if (member := self._members.get(slot)) is not None:
            await self.drain(member)
            await self._until_idle(slot)
        await self._forget(slot)

    async def convert(self, slot: Slot) -> None:
        """Have a prefill worker's process load every chain and go on as a decode worker.

        Raises:
            ColmError: it could not, and is replaced by a prefill worker.
        """
        await self._supervisors.leave_alone(slot)
        decode = replace(slot, role=Role.DECODE, index=self._next_index(Role.DECODE))
        timeout_s = self._config.ray.start_timeout_s
        if (prefill := self._members.get(slot)) is not None:
            await self.drain(prefill)
        try:
            member = await self._actors.call(
                slot, "become_decode", decode.worker_id, timeout_s=timeout_s
            )
        except ColmError:
            await self._evict(slot)
            self._supervisors.watch(slot)
            raise
        await self.stop_standby(slot)
        self._withdraw(slot)
        self._slots.remove(slot)
        self._slots.append(decode)
        self._actors.hand_over(slot, decode)
        self._places.hand_over(slot, decode)
        self._members[decode] = member
        await self._publish()
        self._supervisors.watch(decode)

    async def drain(self, member: Member) -> None:
        """Give a worker no new requests."""
        if member not in self._draining:
            self._draining.add(member)
            await self._publish()

    async def undrain(self, member: Member) -> None:
        """Give a worker new requests again."""
        if member in self._draining:
            self._draining.remove(member)
            await self._publish()

    async def start_standby(self, slot: Slot) -> None:
        """Have a prefill worker's process decode too; raises as `load`."""
        timeout_s = self._config.ray.start_timeout_s
        self._standbys[slot] = await self._actors.call(slot, "start_standby", timeout_s=timeout_s)
        self._tell(f"{slot.worker_id} decodes at level 1 while no decode worker is there")
        await self._publish()

    async def stop_standby(self, slot: Slot) -> None:
        """Have it give the memory back; texts that still run there move. Raises as `load`."""
        if (member := self._standbys.pop(slot, None)) is not None:
            self._draining.discard(member)
            await self._publish()
            await self._actors.call(slot, "stop_standby")
            self._tell(f"{slot.worker_id} decodes no more")

    async def num_standby_requests(self, slot: Slot) -> int:
        """Texts under way at a standby; raises as `load`."""
        return int(await self._actors.call(slot, "num_standby_requests"))

    async def _fill(self, slot: Slot) -> None:
        """Put a fresh actor into a slot and let the router know."""
        self._actors.make(slot, self._places.strategy(slot), self._arguments(slot))
        timeout_s = self._config.ray.start_timeout_s
        description = await self._actors.call(slot, "describe", timeout_s=timeout_s)
        if slot.role is Role.ROUTER:
            self._addresses = description
        else:
            self._members[slot] = description
        await self._publish()

    def _arguments(self, slot: Slot) -> tuple[Any, ...]:
        if slot.role is Role.DECODE:
            return (self._config, slot.worker_id, slot.variant)
        if slot.role is Role.PREFILL:
            return (self._config, slot.worker_id)
        if self._addresses is None:
            return (self._config,)
        # A router that is replaced listens where its clients know it.
        ports = {"grpc_port": self._addresses.grpc_port, "http_port": self._addresses.http_port}
        router = self._config.router.model_copy(update=ports)
        return (self._config.model_copy(update={"router": router}),)

    def _next_index(self, role: Role) -> int:
        self._num_made[role] += 1
        return self._num_made[role] - 1

    async def _until_idle(self, slot: Slot) -> None:
        """Wait for a draining worker's last request, no longer than it may take; or its end."""
        try:
            async with asyncio.timeout(self._config.ray.drain_s):
                while await self._actors.call(slot, "num_requests"):
                    await asyncio.sleep(_IDLE_POLL_S)
        except (TimeoutError, Unavailable, DeadlineExceeded) as error:
            self._tell(f"{slot.worker_id} is ended with requests under way: {error}")

    async def _evict(self, slot: Slot) -> None:
        """Whatever is in the slot is no member any more, and gets no time to end."""
        self._withdraw(slot)
        self._actors.kill(slot)
        await self._publish()

    async def _forget(self, slot: Slot) -> None:
        """End what is in a slot and give its place back."""
        self._withdraw(slot)
        await self._publish()
        if slot in self._actors:
            await self._actors.end(slot)
        self._slots.remove(slot)
        self._places.leave(slot)

    def _withdraw(self, slot: Slot) -> None:
        """Take a slot's members out of the membership."""
        for members in (self._members, self._standbys):
            if (member := members.pop(slot, None)) is not None:
                self._draining.discard(member)

    async def _publish(self) -> None:
        self._version += 1
        self.changed.set()
        if self.router not in self._actors:
            return
        try:
            await self._actors.call(self.router, "update_membership", self.membership())
        except ColmError as error:
            # Its own supervisor replaces it, or tells it again once it answers.
            logger.warning("the router missed membership %d: %s", self._version, error)

    async def _catch_up(self, slot: Slot) -> None:
        """A router that was busy may have missed who is there."""
        if slot.role is Role.ROUTER:
            await self._publish()
