from __future__ import annotations

import asyncio
from itertools import count

import pytest

from colm_serve.core import DecodeStatus, Member, Membership, WorkerKind
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.overload import MAX_POLLS_PER_S
from colm_serve.router.poller import StatusPoller
from colm_serve.router.worker_client import WorkerClients
from tests.router.scripted import KV_IDENTITY, decode_status


class Answering(WorkerClients):
    """Workers that answer at once; counts how often they are asked."""

    def __init__(self) -> None:
        super().__init__(tls=None)
        self.num_asked = 0

    async def status(self, member: Member, timeout_s: float) -> DecodeStatus:
        self.num_asked += 1
        return decode_status()


class SleepersClock:
    """Time passes when all sleep: then the next one to wake is woken."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = count()
        self._sleeping: list[tuple[float, int, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        waking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.now + seconds, next(self._numbers), waking))
        await waking

    async def wake_next(self, num_sleepers: int) -> None:
        while len(self._sleeping) < num_sleepers:
            await asyncio.sleep(0)
        first = min(self._sleeping)
        self._sleeping.remove(first)
        self.now = first[0]
        first[2].set_result(None)


@pytest.mark.parametrize("num_workers", [3, 1000])
async def test_however_many_workers_only_so_many_are_asked_in_a_second(num_workers: int) -> None:
    clients, view, clock = Answering(), ClusterView(KV_IDENTITY), SleepersClock()
    poller = StatusPoller(view, clients, interval_s=0.5, timeout_s=1.0, sleep=clock.sleep)
    workers = [f"d{i}" for i in range(num_workers)]
    members = tuple(Member(WorkerKind.DECODE, w, "127.0.0.1:1", 1, KV_IDENTITY) for w in workers)
    await poller.update_membership(Membership(1, members))
    asked_at: list[float] = []
    while clock.now < 20:
        await clock.wake_next(num_workers)
        asked_at += [clock.now] * (clients.num_asked - len(asked_at))
    await poller.stop()
    assert view.num_decode() == num_workers
    late = [at for at in asked_at if at > 10]
    assert len(late) == pytest.approx(10 * min(num_workers / 0.5, MAX_POLLS_PER_S), rel=0.1)
    busiest = max(sum(at <= other < at + 0.1 for other in late) for at in late[::50])
    assert busiest <= 2 * 0.1 * MAX_POLLS_PER_S, "they do not come in bursts"
