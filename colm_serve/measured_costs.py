"""What the workers of a running cluster have measured of their work, for the simulator."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from colm_serve.client import AsyncClient
from colm_serve.config import TlsConfig
from colm_serve.core import DecodeStatus, Member, PrefillStatus, WorkerKind
from colm_serve.errors import Unavailable
from colm_serve.router.worker_client import WorkerClients
from colm_serve.simulate.costs import PassCosts, StepCosts, WorkerCosts

_TIMEOUT_S = 10.0
#: Calls to each worker, whose median tells how long a message takes.
_NUM_CALLS = 25


def measure_costs(address: str, tls: TlsConfig | None = None) -> WorkerCosts:
    """Ask the router at `address` for its workers, and one of each kind for its costs.

    The costs are those of the work done so far: let the cluster serve for a while before.

    Raises:
        Unavailable: there is no worker of one kind, or it does not answer.
    """
    return asyncio.run(_measure(address, tls))


async def _measure(address: str, tls: TlsConfig | None) -> WorkerCosts:
    async with AsyncClient(address, tls) as client:
        status = await client.status()
    members = [
        Member(WorkerKind(w.kind), w.worker_id, w.address, w.epoch, "")
        for w in status.workers
        if w.is_reachable
    ]
    clients = WorkerClients(tls)
    try:
        statuses = [await clients.status(member, _TIMEOUT_S) for member in members]
        seconds = [0.0]
        for member in members * _NUM_CALLS:
            begin = time.perf_counter()
            await clients.status(member, _TIMEOUT_S)
            seconds.append(time.perf_counter() - begin)
    finally:
        await clients.close_all()
    return costs_of(statuses, hop_s=statistics.median(seconds) / 2)


def costs_of(statuses: Sequence[DecodeStatus | PrefillStatus], hop_s: float) -> WorkerCosts:
    """The first of each kind stands for all of it.

    Raises:
        Unavailable: there is none of one kind.
    """
    decode = next((s for s in statuses if isinstance(s, DecodeStatus)), None)
    prefill = next((s for s in statuses if isinstance(s, PrefillStatus)), None)
    if decode is None or prefill is None:
        kind = "decode" if decode is None else "prefill"
        raise Unavailable(f"no {kind} worker answers, so that nothing is known of its costs")
    return WorkerCosts(
        step=StepCosts.of(decode.step_cost),
        prefill=PassCosts.of(prefill.cost),
        transfer_token_s=decode.transfer_cost.token_s,
        hop_s=hop_s,
    )
