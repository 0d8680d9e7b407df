"""One supervisor a slot: it asks the actor there how it is, and has it replaced when it is dead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from colm_serve.cluster.actors import Actors
from colm_serve.cluster.placement import Slot
from colm_serve.cluster.pulse import Pulse
from colm_serve.config import RayConfig
from colm_serve.errors import ColmError, DeadlineExceeded, Unavailable

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 30.0
#: For one question; a process that is slower is busy, or dead: see `pulse`.
_ANSWER_TIMEOUT_S = 5.0


class Supervisors:
    """Belongs to one event loop.

    Args:
        fill: puts a fresh actor into a slot.
        evict: takes what is in a slot out of the cluster, and kills it.
        catch_up: called when an actor answers again, as it may have missed something.
        tell: hears of everything that is done to an actor, in a line each.
    """

    def __init__(
        self,
        config: RayConfig,
        actors: Actors,
        *,
        fill: Callable[[Slot], Awaitable[None]],
        evict: Callable[[Slot], Awaitable[None]],
        catch_up: Callable[[Slot], Awaitable[None]],
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._actors = actors
        self._fill = fill
        self._evict = evict
        self._catch_up = catch_up
        self._tell = tell
        self._tasks: dict[Slot, asyncio.Task[None]] = {}
        self.num_restarts = 0

    def watch(self, slot: Slot) -> None:
        """Begin to supervise a slot that is filled, or is to be."""
        self._tasks[slot] = asyncio.create_task(self._watch(slot))

    async def leave_alone(self, slot: Slot) -> None:
        """End a slot's supervision: from now on it is not filled again."""
        if (task := self._tasks.pop(slot, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, slot: Slot) -> None:
        backoff_s = self._config.health_interval_s
        is_filled = slot in self._actors
        while True:
            try:
                if is_filled:
                    await self._stay_while_alive(slot)
                await asyncio.sleep(backoff_s)
                self.num_restarts += 1
                begin = time.monotonic()
                await self._fill(slot)
                self._tell(f"{slot.worker_id} serves again after {time.monotonic() - begin:.1f} s")
                is_filled, backoff_s = True, self._config.health_interval_s
            except ColmError as error:
                if is_filled:
                    self._tell(f"{slot.worker_id} is replaced: {error}")
                else:
                    self._tell(f"{slot.worker_id} did not start: {error}")
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                is_filled = False
                await self._evict(slot)

    async def _stay_while_alive(self, slot: Slot) -> None:
        """Raises ColmError with what the slot's actor has died of."""
        config = self._config
        pulse = Pulse(config.still_s, config.busy_s, time.monotonic())
        is_busy = False
        while True:
            await asyncio.sleep(config.health_interval_s)
            try:
                health = await self._actors.call(slot, "health", timeout_s=_ANSWER_TIMEOUT_S)
            except DeadlineExceeded:
                cpu_s = await self._actors.processor_s(slot, pulse.pid)
                trouble = pulse.silent(cpu_s, time.monotonic())
                if not (is_busy or trouble):
                    self._tell(f"{slot.worker_id} is busy: no answer in {_ANSWER_TIMEOUT_S:.0f} s")
                is_busy = True
            else:
                trouble = pulse.answered(health, time.monotonic())
                if is_busy and not trouble:
                    self._tell(f"{slot.worker_id} answers again")
                    await self._catch_up(slot)
                    is_busy = False
            if trouble:
                raise Unavailable(trouble)
