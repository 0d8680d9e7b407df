"""What one bad request does to ten good streams beside it, and how soon it is refused.

The bundled model on Ray: a router, a prefill and a decode worker. Ten clients stream without a
pause while one offender after another does its worst, from a process of its own. For each: the
longest time that any of the ten waited for a token, and how long a refusal by size took. No process
may end, no other request may fail, and memory has to come back. Before all that, how long a
one-token completion takes on a connection that is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from offenders import OFFENDERS, Body
from reporting import Row, save, show
from rich.console import Console

from colm_serve.client import AsyncClient, Started, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.errors import ColmError, UnknownRequest

ROOT = Path(__file__).parent.parent
CONFIG = {"model": str(ROOT / "models" / "stdlib-air"), "decode": {"kv_tokens": 65536}}
NUM_STREAMS, NUM_CALLS, NUM_WARM_UP = 10, 300, 300
#: Beyond an offender's end, for what it set off.
AFTERMATH_S = 1.0
OFFENDER_TIMEOUT_S = 150.0
MOVES_PER_S, MOVING_S = 50, 5.0
MAX_GAP_MS, MAX_ANSWER_MS, MAX_CALL_MS, MAX_GROWTH_MB = 200.0, 100.0, 8.0, 300.0
NOBODY, MOVER = "nobody", "set_level on everything"

console = Console()


class Streams:
    """Ten texts under way, each followed by another; notes the longest wait for any token."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._last = [time.perf_counter()] * NUM_STREAMS
        self._longest_s = 0.0
        self.request_ids: dict[int, str] = {}
        self.failures: list[str] = []

    def begin(self) -> None:
        """Gaps that began before count from now on."""
        self._last = [time.perf_counter()] * NUM_STREAMS
        self._longest_s = 0.0

    def end(self) -> float:
        """The longest gap since `begin`, in seconds."""
        now = time.perf_counter()
        return max(self._longest_s, *(now - last for last in self._last))

    async def run(self, number: int) -> None:
        while True:
            try:
                stream = self._client.generate(
                    f"def f{number}(", max_tokens=1500, ignore_eos=True, seed=number
                )
                async for event in stream:
                    if isinstance(event, Started):
                        self.request_ids[number] = event.request_id
                    if isinstance(event, Token):
                        now = time.perf_counter()
                        self._longest_s = max(self._longest_s, now - self._last[number])
                        self._last[number] = now
            except ColmError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)


@asynccontextmanager
async def streaming(address: str) -> AsyncIterator[tuple[Streams, AsyncClient]]:
    async with AsyncClient(address) as client:
        streams = Streams(client)
        tasks = [asyncio.create_task(streams.run(i)) for i in range(NUM_STREAMS)]
        await asyncio.sleep(3.0)
        try:
            yield streams, client
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def actor_mb() -> dict[int, float]:
    """Resident memory of the cluster's processes."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "Actor" in " ".join(process.cmdline()):
                found[process.pid] = process.memory_info().rss / 1e6
    return found


async def offence(name: str, cluster: Cluster) -> dict[str, Any]:
    """Let an offender act; what it was answered, if it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "benchmarks" / "offenders.py"), name,
        f"http://{cluster.addresses.http}", cluster.addresses.grpc,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    await process.stdout.readline()
    return {"process": process}


async def act(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    process.stdin.write(b"\n")
    try:
        async with asyncio.timeout(OFFENDER_TIMEOUT_S):
            said = await process.stdout.readline()
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    answer: dict[str, Any] = json.loads(said or b"{}")
    return answer


async def move(streams: Streams, client: AsyncClient) -> None:
    """Move all ten, over and over."""
    for i in range(int(MOVES_PER_S * MOVING_S)):
        for request_id in list(streams.request_ids.values()):
            with suppress(UnknownRequest):
                await client.set_level(request_id, 1 + i % 4)
        await asyncio.sleep(1 / MOVES_PER_S)


def measure_calls(address: str) -> Row:
    """One-token completions, one after another on one connection, by a client that adds little."""
    body = json.dumps({"prompt": "import ", "max_tokens": 1, "temperature": 0})
    times = []
    connection = HTTPConnection(address, timeout=30)
    for _ in range(NUM_WARM_UP + NUM_CALLS):
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        times.append((time.perf_counter() - begin) * 1e3)
    connection.close()
    return Row.of(
        "one-token completion, connection kept", times[NUM_WARM_UP:], "ms", "lower",
        target=MAX_CALL_MS, headline=True,
    )  # fmt: skip


async def measure(cluster: Cluster, names: list[str], num_rounds: int) -> list[Row]:
    rows = [measure_calls(cluster.addresses.http)]
    gaps_ms: defaultdict[str, list[float]] = defaultdict(list)
    answers_ms: defaultdict[str, list[float]] = defaultdict(list)
    growth_mb: list[float] = []
    epochs = {member.epoch for member in cluster.view().membership.members}
    router = cluster.addresses
    async with streaming(cluster.addresses.grpc) as (streams, client):
        before = actor_mb()
        for name in names * num_rounds:
            process = None
            if name not in (NOBODY, MOVER):
                process = (await offence(name, cluster))["process"]
            await asyncio.sleep(AFTERMATH_S)
            streams.begin()
            said: dict[str, Any] = {}
            if process is not None:
                said = await act(process)
            elif name == MOVER:
                await move(streams, client)
            await asyncio.sleep(AFTERMATH_S)
            gap_ms = streams.end() * 1e3
            gaps_ms[name].append(gap_ms)
            offender = OFFENDERS.get(name)
            if isinstance(offender, Body) and offender.refused:
                answers_ms[name].append(said["answer_ms"])
                assert 400 <= said["status"] < 500, said
            after = actor_mb()
            growth_mb.append(max(after[pid] - before[pid] for pid in before if pid in after))
            console.print(f"{name}: gap {gap_ms:.0f} ms, {said}, +{growth_mb[-1]:.0f} MB")
        failures = streams.failures
    view = cluster.view()
    num_ended = len(epochs - {m.epoch for m in view.membership.members}) + view.num_restarts
    assert view.addresses == router
    for failure in failures:
        console.print(f"[red]{failure}")
    rows += [
        Row.of(
            f"longest gap beside: {name}", values, "ms", "lower", target=MAX_GAP_MS,
            headline=name == "a prompt of 10 MB",
        )
        for name, values in gaps_ms.items()
    ]  # fmt: skip
    rows += [
        Row.of(f"answer to: {name}", values, "ms", "lower", target=MAX_ANSWER_MS)
        for name, values in answers_ms.items()
    ]
    rows.append(Row.of("processes that ended", [num_ended], "", "lower", target=0))
    rows.append(Row.of("other requests that failed", [len(failures)], "", "lower", target=0))
    rows.append(
        Row.of("memory that a process has grown by", growth_mb, "MB", "lower", target=MAX_GROWTH_MB)
    )
    return rows


def main() -> None:
    names = [NOBODY, *OFFENDERS, MOVER]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME")
    arguments = parser.parse_args()
    with Cluster(ClusterConfig.model_validate(CONFIG)) as cluster:
        rows = asyncio.run(measure(cluster, arguments.only, arguments.rounds))
    show("Neighbours of bad requests", rows)
    if arguments.only == names:
        save("neighbours", rows)


if __name__ == "__main__":
    main()
