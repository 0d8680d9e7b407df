"""The controller actor: fills the cluster's slots, replaces the dead, tells the router who lives.

Ray places and ends processes; requests and KV never pass through it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from colm_serve.cluster.placement import Role, Slot, slots_of
from colm_serve.config import ClusterConfig
from colm_serve.core import Member, Membership
from colm_serve.decode_worker.actor import DecodeActor
from colm_serve.errors import ColmError, Unavailable
from colm_serve.prefill_worker.actor import PrefillActor
from colm_serve.router.actor import RouterActor, RouterAddresses

logger = logging.getLogger(__name__)

_ACTORS: dict[Role, type] = {
    Role.ROUTER: RouterActor,
    Role.PREFILL: PrefillActor,
    Role.DECODE: DecodeActor,
}
_STOP_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = 10.0
_MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class ClusterView:
    """What the controller knows of its cluster."""

    addresses: RouterAddresses
    membership: Membership
    num_restarts: int


class Controller:
    """One a cluster, itself a Ray actor; all methods run on its event loop."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._slots = slots_of(config)
        self._actors: dict[Slot, Any] = {}
        self._members: dict[Slot, Member] = {}
        self._version = 0
        self._num_restarts = 0
        self._addresses: RouterAddresses | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._group: PlacementGroup | None = None

    async def start(self) -> RouterAddresses:
        """Start every actor; returns when all serve.

        Raises:
            Unavailable: Ray has not the resources, or an actor did not come up in time.
            ColmError: an actor refused to start, with its reason.
        """
        self._group = await self._reserve()
        timeout_s = self._config.ray.start_timeout_s
        # The router last: it is told of every worker before it opens its doors.
        workers = [slot for slot in self._slots if slot.role is not Role.ROUTER]
        await asyncio.gather(*(self._fill(slot, timeout_s) for slot in workers))
        (router,) = (slot for slot in self._slots if slot.role is Role.ROUTER)
        await self._fill(router, timeout_s)
        self._tasks = [asyncio.create_task(self._supervise(slot)) for slot in self._slots]
        assert self._addresses is not None
        return self._addresses

    async def view(self) -> ClusterView:
        assert self._addresses is not None, "start comes first"
        return ClusterView(self._addresses, self._membership(), self._num_restarts)

    async def stop(self) -> None:
        """Stop the router, then the workers, then give the resources back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for is_router in (True, False):
            slots = [s for s in self._actors if (s.role is Role.ROUTER) is is_router]
            await asyncio.gather(*(self._end(slot) for slot in slots))
        if self._group is not None:
            remove_placement_group(self._group)

    async def _reserve(self) -> PlacementGroup:
        wanted = [slot.resources for slot in self._slots]
        group = placement_group(wanted, strategy="PACK")
        try:
            await asyncio.wait_for(group.ready(), self._config.ray.start_timeout_s)
        except TimeoutError as error:
            remove_placement_group(group)
            raise Unavailable(
                f"Ray could not place {len(wanted)} actors within "
                f"{self._config.ray.start_timeout_s} s: wanted {wanted}, the cluster has "
                f"{ray.cluster_resources()}"
            ) from error
        return group

    async def _fill(self, slot: Slot, timeout_s: float) -> None:
        """Put a fresh actor into a slot and let the router know."""
        options = {
            "num_cpus": slot.num_cpus,
            "num_gpus": slot.num_gpus,
            "max_concurrency": 4,
            "runtime_env": {"env_vars": slot.environment},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=slot.bundle
            ),
        }
        actor = ray.remote(_ACTORS[slot.role]).options(**options).remote(*self._arguments(slot))
        self._actors[slot] = actor
        try:
            description = await asyncio.wait_for(actor.describe.remote(), timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"{slot.worker_id} did not start within {timeout_s} s") from error
        except ray.exceptions.RayError as error:
            raise _reason(slot, error) from error
        if slot.role is Role.ROUTER:
            self._addresses = description
        else:
            self._members[slot] = description
            self._version += 1
        await self._publish()

    def _arguments(self, slot: Slot) -> tuple[Any, ...]:
        if slot.role is not Role.ROUTER:
            return (self._config, slot.worker_id)
        if self._addresses is None:
            return (self._config,)
        # A router that is replaced listens where its clients know it.
        ports = {"grpc_port": self._addresses.grpc_port, "http_port": self._addresses.http_port}
        router = self._config.router.model_copy(update=ports)
        return (self._config.model_copy(update={"router": router}),)

    async def _supervise(self, slot: Slot) -> None:
        """Watch a slot's actor; evict it when it dies or its engine fails, and replace it."""
        backoff_s = self._config.ray.health_interval_s
        is_filled = True
        while True:
            await asyncio.sleep(backoff_s)
            try:
                if is_filled:
                    call = self._actors[slot].describe.remote()
                    await asyncio.wait_for(call, _CALL_TIMEOUT_S)
                else:
                    self._num_restarts += 1
                    await self._fill(slot, self._config.ray.start_timeout_s)
                    is_filled = True
                backoff_s = self._config.ray.health_interval_s
            except (ray.exceptions.RayError, ColmError, TimeoutError) as error:
                logger.warning("%s is gone: %s", slot.worker_id, error)
                if not is_filled:
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                is_filled = False
                await self._evict(slot)

    async def _evict(self, slot: Slot) -> None:
        if self._members.pop(slot, None) is not None:
            self._version += 1
        if (actor := self._actors.pop(slot, None)) is not None:
            ray.kill(actor)
        await self._publish()

    async def _publish(self) -> None:
        router = next((a for s, a in self._actors.items() if s.role is Role.ROUTER), None)
        if router is None:
            return
        call = router.update_membership.remote(self._membership())
        try:
            await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            # Its own supervisor replaces it, and a fresh router is told first thing.
            logger.warning("the router missed membership %d: %s", self._version, error)

    def _membership(self) -> Membership:
        members = sorted(self._members.items(), key=lambda item: item[0].bundle)
        return Membership(self._version, tuple(member for _, member in members))

    async def _end(self, slot: Slot) -> None:
        actor = self._actors[slot]
        try:
            await asyncio.wait_for(actor.stop.remote(), _STOP_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("%s did not stop by itself: %s", slot.worker_id, error)
        ray.kill(actor)


def _reason(slot: Slot, error: ray.exceptions.RayError) -> ColmError:
    """The error that an actor's constructor raised, out of Ray's wrapping."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ColmError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return Unavailable(f"{slot.worker_id} did not start: {error}")
