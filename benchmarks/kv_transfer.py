"""What moving KV from a prefill worker to a decode worker costs, against bare gRPC and TCP.

Two processes on one machine. KV goes end to end, out of the sender's pages into the receiver's,
its digests checked, by each path: the sender is a prefill service that finds the prompt in its
prefix cache and so computes nothing, the receiver the decode worker's fetcher. By turns with it go
as many bytes in messages of the same size over gRPC alone, where nobody looks at them; over gRPC
out of a buffer and into another, the least that KV needs; and over a TCP socket into a buffer. CPU
seconds are those of both processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import torch
from reporting import Row, save, show
from rich.console import Console

from colm_serve.cluster.placement import MALLOC
from colm_serve.config import PrefillConfig
from colm_serve.core import DecodeRequest, KvLayout, PrefillPeer, SamplingParams
from colm_serve.decode_worker.prefill_plan import LocalLoad
from colm_serve.decode_worker.prefill_planner import PrefillPlanner
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.engine.loading import to_serving
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel
from colm_serve.prefill_worker import frame_packer
from colm_serve.prefill_worker.service import PrefillService
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.channel_cache import ChannelCache
from colm_serve.transport.host import ServiceThread
from colm_serve.transport.kv_frames import MESSAGE

#: The K and V of a 1B model, 64 KiB a token; what it takes to compute them is of no interest.
MODEL = ColmConfig(
    vocab_size=64, chains=(8,), d_model=512, d_ff=512, num_layers=16, num_heads=8,
    num_kv_heads=8, head_dim=64, max_context=65536,
)  # fmt: skip
LAYOUT = KvLayout(MODEL.num_layers, MODEL.num_kv_heads, MODEL.head_dim, "float32")
BYTES_PER_TOKEN = LAYOUT.num_layers * LAYOUT.num_elements_per_token * 4
IDENTITY = "random weights"
PAGE_SIZE = 16
#: 0 stands for the sizes that prefill workers use, of messages and in shared memory.
SWEEP_BYTES = (0, 64 * 1024, 256 * 1024, 1024 * 1024, 4 * 1024 * 1024)
#: What is compared, and how the rows call it.
WAYS = {
    "frames": "KV over gRPC",
    "connections": "KV over two gRPC connections",
    "memory": "KV over shared memory",
    "grpc": "bare gRPC",
    "copies": "gRPC between buffers",
    "tcp": "raw TCP",
}
#: Numerator, denominator, least ratio to reach.
RATIOS = (
    ("frames", "grpc", 0.9),
    ("frames", "copies", None),
    ("frames", "tcp", None),
    ("connections", "frames", None),
    ("memory", "frames", 3.0),
)
HOST = "127.0.0.1"


class BareService:
    """Sends messages to who calls; see `transport.host.Service`."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages
        self._buffer = np.frombuffer(b"".join(messages), np.uint8)
        self.address = ""

    async def start(self) -> None:
        self._server = make_server()
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Send": grpc.unary_stream_rpc_method_handler(self._send),
            "Copy": grpc.unary_stream_rpc_method_handler(self._copy),
        }
        handlers = grpc.method_handlers_generic_handler("benchmark", methods)
        self._server.add_generic_rpc_handlers((handlers,))
        self.address = bind(self._server, HOST, 0, None)
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    async def _send(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for message in self._messages:
            await context.write(message)

    async def _copy(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for part in np.split(self._buffer, len(self._messages)):
            await context.write(part.tobytes())


def serve_tcp(listener: socket.socket, messages: list[bytes]) -> None:
    """The same over TCP, to one caller after the other."""
    while True:
        connection, _ = listener.accept()
        with connection:
            for message in messages:
                connection.sendall(message)


def send(num_tokens: int, frame_bytes: int) -> None:
    """The sending process: print the three addresses, serve until standard input ends."""
    if frame_bytes:
        frame_packer.FRAME_BYTES.update(dict.fromkeys(frame_packer.FRAME_BYTES, frame_bytes))
    else:
        frame_bytes = frame_packer.FRAME_BYTES[MESSAGE]
    model = to_serving(ColmModel(MODEL, num_chains=1, with_head=False))
    config = PrefillConfig(kv_tokens=num_tokens + PAGE_SIZE, page_size=PAGE_SIZE, host=HOST)
    service = PrefillService(
        PrefillWorker(LoadedModel(model, IDENTITY), config, "prefill-0", epoch=1), config
    )
    # As much memory as the KV has: one message again and again would stay in a core's cache.
    num_messages = num_tokens * BYTES_PER_TOKEN // frame_bytes
    messages = [bytes([i % 256]) * frame_bytes for i in range(num_messages)]
    bare = BareService(messages)
    hosts = [ServiceThread(service), ServiceThread(bare)]
    listener = socket.create_server((HOST, 0))
    threading.Thread(target=serve_tcp, args=(listener, messages), daemon=True).start()
    addresses = {"frames": service.address, "grpc": bare.address, "tcp": listener.getsockname()[1]}
    print(json.dumps(addresses), flush=True)
    sys.stdin.read()
    for host in hosts:
        host.stop()


@contextmanager
def sender(num_tokens: int, frame_bytes: int) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """A sending process and its addresses."""
    command = [sys.executable, __file__, "--send", str(num_tokens), str(frame_bytes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), json.loads(process.stdout.readline())
        finally:
            process.stdin.close()


class Receiver:
    """Gets the same number of bytes from a sender by each way."""

    def __init__(
        self, addresses: dict[str, Any], num_tokens: int, channels: ChannelCache, pool: KvPool
    ) -> None:
        self._addresses = addresses
        self._num_tokens = num_tokens
        self._channels = channels
        self._pages = tuple(range(pool.num_pages))
        self._fetchers = {
            "frames": fetcher(pool, channels),
            "connections": fetcher(pool, channels, num_connections=2),
            "memory": fetcher(pool, channels, use_shared_memory=True),
        }
        self._buffer = bytearray(num_tokens * BYTES_PER_TOKEN)

    def close(self) -> None:
        for each in self._fetchers.values():
            each.close()

    async def get(self, way: str) -> None:
        """Everything once, by one of `WAYS`."""
        match way:
            case "grpc" | "copies":
                await self._over_bare_grpc(is_copied=way == "copies")
            case "tcp":
                await self._over_tcp()
            case _:
                await self._fetch(self._fetchers[way])

    async def _fetch(self, fetcher: PromptFetcher) -> None:
        # The last token of a prompt is not shipped.
        prompt = (0,) * (self._num_tokens + 1)
        peers = (PrefillPeer(self._addresses["frames"]),)
        request = DecodeRequest(
            "benchmark", prompt, 1, SamplingParams(max_tokens=1), peers, IDENTITY
        )
        sequence = Sequence(request, 0, 1, frozenset(), self._pages)
        await fetcher.fetch(sequence)
        assert sequence.num_missing == 0, "the transfer failed"

    async def _over_bare_grpc(self, *, is_copied: bool) -> None:
        async with self._channels.use(self._addresses["grpc"]) as channel:
            send: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
                "/benchmark/Copy" if is_copied else "/benchmark/Send",
                request_serializer=bytes,
                response_deserializer=bytes,
            )
            at = 0
            async for message in send(b""):
                if is_copied:
                    self._buffer[at : at + len(message)] = message
                    at += len(message)

    async def _over_tcp(self) -> None:
        with socket.create_connection((HOST, self._addresses["tcp"])) as connection:
            left = memoryview(self._buffer)
            while left:
                left = left[connection.recv_into(left) :]


def fetcher(pool: KvPool, channels: ChannelCache, **way: Any) -> PromptFetcher:
    # No speed of computing here is known, so that all is shipped.
    planner = PrefillPlanner(lambda _: LocalLoad(None, 0, 0), LAYOUT.num_layers)
    return PromptFetcher(pool, LAYOUT, IDENTITY, channels, 60.0, "raw", planner, **way)


@dataclass(frozen=True)
class Cost:
    """Of moving `num_bytes` once."""

    num_bytes: int
    seconds: float
    cpu_s: float

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / 1e9 / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.num_bytes / 1e9)


async def cost(getting: Awaitable[None], num_bytes: int, processes: list[psutil.Process]) -> Cost:
    cpu_before, begin = cpu_seconds(processes), time.perf_counter()
    await getting
    seconds = time.perf_counter() - begin
    return Cost(num_bytes, seconds, cpu_seconds(processes) - cpu_before)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(of_process.user + of_process.system for of_process in times)


async def compare(num_tokens: int, frame_bytes: int, repeats: int) -> dict[str, list[Cost]]:
    """The costs of each way, taken in turn so that all meet the same machine."""
    pool = KvPool(LAYOUT, num_tokens // PAGE_SIZE, PAGE_SIZE)
    channels = ChannelCache(None)
    with sender(num_tokens, frame_bytes) as (process, addresses):
        receiver = Receiver(addresses, num_tokens, channels, pool)
        processes = [psutil.Process(), process]
        costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
        try:
            for way in WAYS:
                await receiver.get(way)
            for _ in range(repeats):
                for way, of_way in costs.items():
                    num_bytes = num_tokens * BYTES_PER_TOKEN
                    of_way.append(await cost(receiver.get(way), num_bytes, processes))
        finally:
            receiver.close()
            await channels.close()
    return costs


def rows_of(frame_bytes: int, costs: dict[str, list[Cost]], is_default: bool) -> list[Row]:
    """Speeds, and ratios taken repeat by repeat; targets are for the sizes that are the default."""
    rows = []
    size = "as served" if is_default else f"{frame_bytes // 1024} KiB frames"
    for name, what in WAYS.items():
        speeds = [of_run.gb_per_s for of_run in costs[name]]
        cpu = [of_run.cpu_s_per_gb for of_run in costs[name]]
        rows.append(Row.of(f"{size}: {what}", speeds, "GB/s", "higher", headline=is_default))
        rows.append(Row.of(f"{size}: {what}, CPU", cpu, "s/GB", "lower"))
    for above, below, target in RATIOS:
        pairs = zip(costs[above], costs[below], strict=True)
        ratios = [a.gb_per_s / b.gb_per_s for a, b in pairs]
        row = Row.of(
            f"{size}: {WAYS[above]} over {WAYS[below]}",
            ratios,
            "x",
            "higher",
            target=target if is_default else None,
            headline=is_default,
            note=_note(target, ratios) if is_default else "",
        )
        rows.append(row)
    return rows


def _note(target: float | None, ratios: list[float]) -> str:
    if target is None or median(ratios) >= target:
        return ""
    return (
        "both processes share two cores, which copying KV out of pages and into pages, and its "
        "digests, keep busy: see gRPC between buffers, and the CPU rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--sizes", type=int, nargs="+", default=SWEEP_BYTES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--send", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    # As in a worker; more of them only wait for each other where two processes share the cores.
    torch.set_num_threads(1)
    if arguments.send:
        send(*arguments.send)
        return
    rows: list[Row] = []
    with Console().status("moving KV"):
        for size in arguments.sizes:
            costs = asyncio.run(compare(arguments.tokens, size, arguments.repeats))
            rows += rows_of(size, costs, is_default=not size)
    show("KV between two processes of one machine", rows)
    print(f"written to {save('kv_transfer', rows)}")


if __name__ == "__main__":
    main()
