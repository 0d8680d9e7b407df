"""The Ray actor in each slot: made, called, ended."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import psutil
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from colm_serve.cluster.convertible import ConvertibleActor
from colm_serve.cluster.placement import Role, Slot
from colm_serve.decode_worker.actor import DecodeActor
from colm_serve.errors import ColmError, DeadlineExceeded, Unavailable
from colm_serve.router.actor import RouterActor

logger = logging.getLogger(__name__)

_CLASSES: dict[Role, type] = {
    Role.ROUTER: RouterActor,
    Role.PREFILL: ConvertibleActor,
    Role.DECODE: DecodeActor,
}
_CALL_TIMEOUT_S = 10.0


class Actors:
    """The actors by slot; belongs to one event loop."""

    def __init__(self) -> None:
        self._actors: dict[Slot, Any] = {}
        self._places: dict[Slot, PlacementGroupSchedulingStrategy] = {}

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._actors

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those that have an actor."""
        return tuple(self._actors)

    def make(
        self, slot: Slot, place: PlacementGroupSchedulingStrategy, arguments: tuple[Any, ...]
    ) -> None:
        """Put a fresh actor into a slot; whether it has come up, the first call says."""
        options = {
            "num_cpus": slot.num_cpus,
            "num_gpus": slot.num_gpus,
            "max_concurrency": 4,
            "runtime_env": {"env_vars": slot.environment},
            "scheduling_strategy": place,
        }
        actor = ray.remote(_CLASSES[slot.role]).options(**options)
        self._actors[slot] = actor.remote(*arguments)
        self._places[slot] = place

    async def call(
        self, slot: Slot, method: str, *arguments: object, timeout_s: float = _CALL_TIMEOUT_S
    ) -> Any:
        """Call a method of a slot's actor.

        Raises:
            Unavailable: it is gone.
            DeadlineExceeded: it does not answer in time.
            ColmError: what it raised.
        """
        actor = self._actors.get(slot)
        if actor is None:
            raise Unavailable(f"{slot.worker_id} is gone")
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(actor, method).remote(*arguments)
        except TimeoutError as error:
            late = f"{slot.worker_id}: no answer to {method} within {timeout_s} s"
            raise DeadlineExceeded(late) from error
        except ray.exceptions.RayError as error:
            raise reason(slot, error) from error

    async def processor_s(self, slot: Slot, pid: int | None) -> float | None:
        """Processor time that a process on a slot's node has used; None where that is unknown."""
        if pid is None:
            return None
        # Another process looks, on the node of the slot: this one hears from nobody there.
        look = ray.remote(_processor_s).options(
            num_cpus=0, max_retries=0, scheduling_strategy=self._places[slot]
        )
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return cast(float, await look.remote(pid))
        except (TimeoutError, ray.exceptions.RayError) as error:
            logger.warning("%s: its processor time is not known: %s", slot.worker_id, error)
            return None

    def hand_over(self, slot: Slot, successor: Slot) -> None:
        """The actor in one slot is another's."""
        self._actors[successor] = self._actors.pop(slot)
        self._places[successor] = self._places.pop(slot)

    def kill(self, slot: Slot) -> None:
        """Give what is in a slot, if anything, no time to end."""
        if (actor := self._actors.pop(slot, None)) is not None:
            ray.kill(actor)

    async def end(self, slot: Slot) -> None:
        """Have the actor in a slot stop, and kill it if it does not."""
        try:
            await self.call(slot, "stop")
        except ColmError as error:
            logger.warning("%s did not stop by itself: %s", slot.worker_id, error)
        ray.kill(self._actors.pop(slot))


def _processor_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def reason(slot: Slot, error: ray.exceptions.RayError) -> ColmError:
    """The error that an actor raised, out of Ray's wrapping."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ColmError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = str(error).strip().splitlines()
    # Of what a constructor raises Ray keeps a traceback's text alone, which ends with it.
    died_at_birth = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
    return Unavailable(f"{slot.worker_id}: {lines[-1 if died_at_birth else 0]}")
