"""What routing costs: the time it adds to the first token, and one decision among many workers.

Requests of 512 tokens come at a steady rate, in turn by a router and straight to the decode worker
behind it, each in a process of its own; the router's is bound to one core. The worker answers at
once, so that all there is to a first token is its way. The time added is a first token's by the
router, at the percentile named, less the median of those straight.

A decision is the choice of candidates and the policy among them, for prompts of 1,024 tokens that
share prefixes; what follows from it (the placement is noted, and taken back at its end) is timed
apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import grpc.aio
from reporting import Row, save, show
from rich.console import Console

from colm_serve.client import AsyncClient, Token
from colm_serve.config import ClusterConfig
from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    Member,
    Membership,
    PrefillCost,
    PrefillStatus,
    SamplingParams,
    StageTimings,
    StepCost,
    WorkerKind,
)
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.placing.decision import decide
from colm_serve.router.placing.policy import RequestFacts, adaptive
from colm_serve.router.placing.snapshot import Work
from colm_serve.router.router import Router
from colm_serve.router.server import RouterService
from colm_serve.transport import serde
from colm_serve.transport.channel import bind, connect, make_server
from colm_serve.transport.host import ServiceThread, settle_heap

KV_IDENTITY = "benchmark"
MODEL = ModelFacts("benchmark", 4, 16384, 32000, KV_IDENTITY)
PAGE_SIZE = 16
NUM_PROMPT_TOKENS = 512
RATE_PER_S = 100.0
NUM_WORKERS = (8, 100, 1000)
NUM_DECISION_TOKENS = 1024
NUM_CONVERSATIONS = 200


class Worker(decode_pb2_grpc.DecodeServiceServicer):
    """A decode worker that says one token at once; a `transport.host.Service`."""

    address = ""

    async def start(self) -> None:
        self._server = make_server()
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._server)
        self.address = bind(self._server, "127.0.0.1", 0, None)
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    async def GetStatus(
        self, request: decode_pb2.DecodeStatusRequest, context: Any
    ) -> decode_pb2.DecodeStatus:
        return serde.decode_status_to_proto(decode_status("worker"))

    async def Decode(self, request: decode_pb2.DecodeStart, context: Any) -> None:
        serde.decode_start_from_proto(request)
        for event in (
            Admitted(0),
            DecodedToken(5, 4),
            Decoded(FinishReason.LENGTH, 0, 0, StageTimings()),
        ):
            await context.write(serde.decode_event_to_proto(event))


def decode_status(worker_id: str, num_rows: int = 0) -> DecodeStatus:
    return DecodeStatus(
        worker_id=worker_id,
        epoch=1,
        kv_identity=KV_IDENTITY,
        num_levels=MODEL.num_levels,
        max_rows=32,
        num_waiting=0,
        num_running=(num_rows, 0, 0, 0),
        num_free_pages=4096 - 64 * num_rows,
        num_pages=4096,
        page_size=PAGE_SIZE,
        step_cost=StepCost((0.004,) * 4, (0.0005,) * 4),
        prefill_tokens_per_s=4000.0,
        expected_output_tokens=256,
        num_preemptions=0,
        num_drafted=0,
        num_accepted=0,
    )


def prefill_status(worker_id: str, num_queued_tokens: int) -> PrefillStatus:
    return PrefillStatus(
        worker_id=worker_id,
        epoch=1,
        kv_identity=KV_IDENTITY,
        num_running=0,
        num_waiting=0,
        num_queued_tokens=num_queued_tokens,
        queued_s=num_queued_tokens / 8000,
        cost=PrefillCost(pass_s=0.001, token_s=1 / 8000, attended_key_s=0.0, chunk_tokens=512),
        num_free_pages=4096,
        num_pages=4096,
        num_computed_tokens=0,
        num_cached_tokens=0,
    )


def serve(kind: str, worker_address: str) -> None:
    """A process that says where it is and serves until its standard input ends."""
    if kind == "worker":
        worker = Worker()
        host = ServiceThread(worker)
        address = worker.address
    else:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        config = ClusterConfig(model=Path(MODEL.name))
        service = RouterService(config, lambda c: Router(c, MODEL, None))
        host = ServiceThread(service)
        member = Member(WorkerKind.DECODE, "worker", worker_address, 1, KV_IDENTITY)
        service.update_membership(Membership(1, (member,)))
        address = service.grpc_address
    settle_heap()
    print(json.dumps({"address": address}), flush=True)
    sys.stdin.read()
    host.stop()


@contextmanager
def serving(kind: str, worker_address: str = "") -> Iterator[str]:
    """The address of a process of its own."""
    command = [sys.executable, __file__, "--serve", kind, worker_address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
        process.communicate()


async def measure_ttft(worker: str, router: str, num_requests: int) -> list[Row]:
    """Time requests at a steady rate, every other one by the router."""
    prompt = tuple(range(NUM_PROMPT_TOKENS))
    async with AsyncClient(router) as client, connect(worker, None) as channel:
        await asyncio.gather(*(routed_s(client, prompt) for _ in range(10)))
        await asyncio.gather(*(straight_s(channel, prompt) for _ in range(10)))
        tasks: dict[str, list[asyncio.Task[float]]] = {"routed": [], "straight": []}
        begin = time.perf_counter()
        for i in range(num_requests):
            await asyncio.sleep(begin + i / RATE_PER_S - time.perf_counter())
            tasks["routed"].append(asyncio.create_task(routed_s(client, prompt)))
            # Half a gap later, so that the two never meet.
            await asyncio.sleep(begin + (i + 0.5) / RATE_PER_S - time.perf_counter())
            tasks["straight"].append(asyncio.create_task(straight_s(channel, prompt)))
        routed, straight = [await asyncio.gather(*each) for each in tasks.values()]
    usual_s = quantiles(straight, n=100)[49]
    added_ms = [(seconds - usual_s) * 1e3 for seconds in routed]
    percentiles = quantiles(added_ms, n=100)
    spread = (min(added_ms), max(added_ms))
    return [
        Row.of("first token straight from the worker", [s * 1e3 for s in straight], "ms", "lower"),
        Row("routing adds to TTFT, p50", percentiles[49], "ms", "lower", spread, 2.0,
            headline=True),
        Row("routing adds to TTFT, p99", percentiles[98], "ms", "lower", spread, 5.0,
            headline=True),
    ]  # fmt: skip


async def routed_s(client: AsyncClient, prompt: tuple[int, ...]) -> float:
    begin = time.perf_counter()
    ttft_s = None
    async for event in client.generate(token_ids=prompt, max_tokens=1):
        if isinstance(event, Token):
            ttft_s = time.perf_counter() - begin
    assert ttft_s is not None, "a generation has a token"
    return ttft_s


async def straight_s(channel: grpc.aio.Channel, prompt: tuple[int, ...]) -> float:
    request = DecodeRequest("r", prompt, 4, SamplingParams(max_tokens=1), (), KV_IDENTITY)
    begin = time.perf_counter()
    ttft_s = None
    stub: Any = decode_pb2_grpc.DecodeServiceStub(channel)
    call = stub.Decode(serde.decode_start_to_proto(request))
    async for message in call:
        if isinstance(serde.decode_event_from_proto(message), DecodedToken):
            ttft_s = time.perf_counter() - begin
    assert ttft_s is not None, "a generation has a token"
    return ttft_s


def measure_decisions(num_workers: int, num_decisions: int) -> list[Row]:
    """Time decisions in a cluster with a prefill worker to four decode workers."""
    draw = random.Random(0)
    view = busy_view(num_workers, draw)
    prefixes = [
        tuple(draw.randrange(MODEL.vocab_size) for _ in range(NUM_DECISION_TOKENS // 2))
        for _ in range(NUM_CONVERSATIONS)
    ]
    deciding_us, noting_us = [], []
    for i in range(num_decisions):
        rest = (draw.randrange(MODEL.vocab_size) for _ in range(NUM_DECISION_TOKENS // 2))
        prompt = (*draw.choice(prefixes), *rest)
        request = RequestFacts(prompt, 256, 1, MODEL.num_levels, ttft_s=0.5, tpot_s=0.05)
        begin = time.perf_counter()
        placement = decide(adaptive, view, request, "")
        decided = time.perf_counter()
        view.place(f"r{i}", placement, Work(placement.level, len(prompt), 256, 0.05), prompt, "")
        view.admitted(f"r{i}", placement)
        view.release(f"r{i}", placement)
        noting_us.append((time.perf_counter() - decided) * 1e6)
        deciding_us.append((decided - begin) * 1e6)
    is_target = num_workers == max(NUM_WORKERS)
    return [
        Row.of(f"{num_workers} decode workers: a decision", deciding_us, "µs", "lower",
               target=200 if is_target else None, headline=is_target),
        Row.of(f"{num_workers} decode workers: noting it and its end", noting_us, "µs", "lower"),
    ]  # fmt: skip


def busy_view(num_workers: int, draw: random.Random) -> ClusterView:
    view = ClusterView(KV_IDENTITY, PAGE_SIZE)
    members = [
        Member(kind, f"{kind.value}-{i}", f"127.0.0.1:{i}", 1, KV_IDENTITY)
        for kind, number in (
            (WorkerKind.DECODE, num_workers),
            (WorkerKind.PREFILL, max(1, num_workers // 4)),
        )
        for i in range(number)
    ]
    view.apply(Membership(1, tuple(members)))
    for member in members:
        status: DecodeStatus | PrefillStatus
        if member.kind is WorkerKind.DECODE:
            status = decode_status(member.worker_id, draw.randrange(24))
        else:
            status = prefill_status(member.worker_id, draw.randrange(4000))
        view.set_status(member, status, frozenset())
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=6000, help="by the router")
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    rows = []
    with Console().status("timing first tokens and decisions"):
        with serving("worker") as worker, serving("router", worker) as router:
            settle_heap()
            rows += asyncio.run(measure_ttft(worker, router, arguments.requests))
        for num_workers in NUM_WORKERS:
            rows += measure_decisions(num_workers, arguments.decisions)
    show("What routing costs", rows)
    print(f"written to {save('router', rows)}")


if __name__ == "__main__":
    main()
