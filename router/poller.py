"""Asks every worker for its status, over and over, each in its own task."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from colm_serve.core import Member, Membership
from colm_serve.errors import ColmError
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.overload import poll_interval_s
from colm_serve.router.worker_client import WorkerClients

logger = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


class StatusPoller:
    """Keeps a ClusterView up to date; a hung worker delays the news of no other.

    A worker is asked every `interval_s` seconds, or less often; see `overload.poll_interval_s`.
    """

    def __init__(
        self,
        view: ClusterView,
        clients: WorkerClients,
        *,
        interval_s: float,
        timeout_s: float,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._view = view
        self._clients = clients
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._tasks: dict[Member, asyncio.Task[None]] = {}

    async def update_membership(self, membership: Membership) -> None:
        """Poll the members of a newer membership; drop those that have left, and their calls."""
        if not self._view.apply(membership):
            return
        members = {record.member for record in self._view.records}
        gone = [member for member in self._tasks if member not in members]
        for member in members - self._tasks.keys():
            self._tasks[member] = asyncio.create_task(self._poll_forever(member))
        await self._end(gone)

    async def stop(self) -> None:
        await self._end(list(self._tasks))

    async def poll(self, member: Member) -> None:
        """Ask one worker once."""
        counted = self._view.counted(member)
        try:
            status = await self._clients.status(member, self._timeout_s)
        except ColmError as error:
            logger.debug("%s: no status: %s", member.worker_id, error)
            self._view.set_unreachable(member)
        else:
            self._view.set_status(member, status, counted)

    async def _poll_forever(self, member: Member) -> None:
        await self.poll(member)
        # Those that joined together are not asked together ever after.
        await self._sleep(self._wait_s() * random.random())
        while True:
            await self.poll(member)
            await self._sleep(self._wait_s())

    def _wait_s(self) -> float:
        return poll_interval_s(self._interval_s, len(self._tasks))

    async def _end(self, members: list[Member]) -> None:
        tasks = [self._tasks.pop(member) for member in members]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in members:
            await self._clients.close(member)
