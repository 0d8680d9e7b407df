"""A cluster of processes on this machine, and traces played against it in real time.

The workers and the router are what Ray's actors host, without Ray: one prefill worker, one decode
worker and a router, each a process with one compute thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from colm_serve.client import AsyncClient, Token
from colm_serve.config import ClusterConfig
from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.decode_worker.service import DecodeService
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine.loading import load_for_serving
from colm_serve.errors import ColmError, DeadlineExceeded
from colm_serve.model.config import ColmConfig
from colm_serve.prefill_worker.service import PrefillService
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.router.server import RouterService
from colm_serve.simulate.outcomes import ClassOutcomes, Outcome
from colm_serve.simulate.trace import Block, Trace, TracedRequest
from colm_serve.transport.host import ServiceThread, settle_heap

NUM_WORKERS = 2


@dataclass(frozen=True)
class Course:
    """One request as its client saw it; times from the begin of the trace, levels by token."""

    traced: TracedRequest
    token_times: list[float]
    levels: list[int]
    is_late: bool = False


@dataclass(frozen=True)
class RealCluster:
    """Where the router is, and the workers behind it."""

    config: ClusterConfig
    address: str
    members: tuple[Member, ...]


@contextmanager
def running(config: ClusterConfig) -> Iterator[RealCluster]:
    """The processes of a cluster, until the context ends."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
        members = []
        for kind in WorkerKind:
            said = stack.enter_context(_process(kind.value, str(path)))
            members.append(Member(kind, kind.value, said["address"], 1, said["kv_identity"]))
        listed = json.dumps([[m.kind.value, m.address, m.kv_identity] for m in members])
        said = stack.enter_context(_process("router", str(path), listed))
        yield RealCluster(config, said["address"], tuple(members))


@contextmanager
def _process(*arguments: str) -> Iterator[dict[str, Any]]:
    """What a process says once it serves; it ends when its standard input does."""
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate()


def serve(kind: str, config: ClusterConfig, members: str) -> None:
    """Serve as one of the processes until standard input ends."""
    torch.set_num_threads(1)
    service: PrefillService | DecodeService | RouterService
    said = {}
    if kind == "router":
        service = RouterService(config)
    elif kind == "prefill":
        loaded = load_for_serving(config.model, num_chains=1, with_head=False)
        p_worker = PrefillWorker(loaded, config.prefill, kind, epoch=1)
        service = PrefillService(p_worker, config.prefill)
        said["kv_identity"] = loaded.kv_identity
    else:
        loaded = load_for_serving(
            config.model, num_chains=None, with_head=True, weight_dtype=config.decode.weight_dtype
        )
        d_worker = DecodeWorker(loaded, config.decode, kind, epoch=1)
        service = DecodeService(d_worker, config.decode)
        said["kv_identity"] = loaded.kv_identity
    host = ServiceThread(service)
    settle_heap()
    if isinstance(service, RouterService):
        listed = (Member(WorkerKind(k), k, a, 1, i) for k, a, i in json.loads(members))
        service.update_membership(Membership(1, tuple(listed)))
        said["address"] = service.grpc_address
    else:
        said["address"] = service.address
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    host.stop()


def replay(cluster: RealCluster, trace: Trace) -> Outcome:
    """Play a trace in real time; what refused or broken off requests met, they met."""
    vocab_size = ColmConfig.load(cluster.config.model).vocab_size
    courses = asyncio.run(_replay(cluster.address, trace, vocab_size))
    return _outcome(cluster.config, courses)


async def _replay(address: str, trace: Trace, vocab_size: int) -> list[Course]:
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        # Prompts are made beforehand: nothing else is to take time while requests are sent.
        requests = [(traced, _token_ids(traced, vocab_size)) for traced in trace.requests()]
        begin = time.perf_counter()
        tasks = []
        for traced, token_ids in requests:
            await asyncio.sleep(max(0.0, begin + traced.arrival_s - time.perf_counter()))
            tasks.append(group.create_task(_request(client, traced, token_ids, begin)))
    return [task.result() for task in tasks]


async def _request(
    client: AsyncClient, traced: TracedRequest, token_ids: list[int], begin: float
) -> Course:
    course = Course(traced, [], [])
    try:
        events = client.generate(
            token_ids=token_ids,
            max_tokens=traced.num_output_tokens,
            ignore_eos=True,
            temperature=0.0,
            sla_class=traced.sla_class,
        )
        async for event in events:
            if isinstance(event, Token):
                course.token_times.append(time.perf_counter() - begin)
                course.levels.append(event.level)
    except ColmError as error:
        return replace(course, is_late=isinstance(error, DeadlineExceeded))
    return course


def _token_ids(traced: TracedRequest, vocab_size: int) -> list[int]:
    """Random tokens, the same ones for the same block."""
    return [token for block in traced.blocks for token in _block_tokens(block, vocab_size)]


def _block_tokens(block: Block, vocab_size: int) -> list[int]:
    draw = random.Random(block.block_id)
    return [draw.randrange(1, vocab_size) for _ in range(block.num_tokens)]


def _outcome(config: ClusterConfig, courses: list[Course]) -> Outcome:
    classes = {name: ClassOutcomes(sla) for name, sla in config.sla_classes.items()}
    levels = [level for course in courses for level in course.levels]
    for course in courses:
        outcomes = classes[course.traced.sla_class or config.default_sla_class]
        times, num_tokens = course.token_times, len(course.token_times)
        if num_tokens < course.traced.num_output_tokens:
            outcomes.num_late += course.is_late
            outcomes.num_refused += not course.is_late
            continue
        tpot_s = (times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else None
        ttft_s = times[0] - course.traced.arrival_s
        outcomes.finished(ttft_s, tpot_s, num_tokens, sum(course.levels) / num_tokens)
    ends = [course.token_times[-1] for course in courses if course.token_times]
    return Outcome(
        classes=classes,
        duration_s=max(ends, default=0.0),
        num_workers=NUM_WORKERS,
        tokens_by_level=tuple(map(levels.count, range(1, max(levels, default=0) + 1))),
        num_preemptions=0,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process of a cluster; see `running`.")
    parser.add_argument("kind")
    parser.add_argument("config", type=Path)
    parser.add_argument("members", nargs="?", default="[]")
    arguments: Any = parser.parse_args()
    serve(arguments.kind, ClusterConfig.load(arguments.config), arguments.members)
