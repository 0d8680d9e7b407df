"""Moves running requests between levels, every so often, as `level_moves` plans it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

from colm_serve.core import DecodeStatus, Member
from colm_serve.errors import UnknownRequest
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.lifecycle import Clock
from colm_serve.router.metrics import Metrics
from colm_serve.router.placing.batch import Move, Row
from colm_serve.router.placing.level_moves import INTERVAL_S, LevelMover
from colm_serve.router.running import RunningRequest

logger = logging.getLogger(__name__)


class LevelLoop:
    """Belongs to one event loop.

    Args:
        running: all requests under way, by id.
        moves_per_s: at each decode worker, at most.
    """

    def __init__(
        self,
        view: ClusterView,
        running: Mapping[str, RunningRequest],
        metrics: Metrics,
        clock: Clock,
        moves_per_s: float,
    ) -> None:
        self._view = view
        self._running = running
        self._metrics = metrics
        self._clock = clock
        self._moves_per_s = moves_per_s
        self._task: asyncio.Task[None] | None = None
        self._movers: dict[Member, LevelMover] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, unless it has begun or nothing is to be moved."""
        if self._moves_per_s and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        tasks = [*self._sending, *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.move()

    def move(self) -> None:
        """Plan and start the moves that are due now at every decode worker."""
        rows: defaultdict[Member, list[Row]] = defaultdict(list)
        for request in self._running.values():
            if request.worker is not None:
                rows[request.worker].append(request.row())
        for idle in self._movers.keys() - rows.keys():
            self._view.set_outlook(idle, None)
        self._movers = {m: self._movers.get(m) or LevelMover(self._moves_per_s) for m in rows}
        for member, mover in self._movers.items():
            status = self._view.status_of(member)
            if isinstance(status, DecodeStatus):
                now, cost = self._clock(), status.step_cost
                moves, outlook = mover.plan(now, rows[member], cost, status.max_rows)
                self._view.set_outlook(member, outlook)
                for move in moves:
                    self._start(move, member)

    def _start(self, move: Move, member: Member) -> None:
        request = self._running[move.request_id]
        logger.debug("request %s: to level %d", move.request_id, move.level)
        self._metrics.level_moved("up" if move.is_up else "down")
        self._view.move(move.request_id, member, move.level)
        request.move_level(move.level)
        # A worker that does not answer holds up nobody else's moves.
        sending = asyncio.create_task(self._send(request))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _send(self, request: RunningRequest) -> None:
        with suppress(UnknownRequest):
            await request.send_level()
