"""TTFT with prefill in a process of its own, over TTFT of one process that does everything.

A decode worker's process answers prompts in turn with and without a prefill worker, which is
another process on the same cores; each has two threads. Every prompt is new to both caches. The
model has random weights, chains {8,8,8,8} and four layers of LLaMA-3.2-1B's shape, fp32.

Exposed transfer is what remains of the KV's way once its last layer has been computed: the time
from then until a receiver has checked all frames and written them into its pages.
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from reporting import Row, save, show
from rich.console import Console

from colm_serve.config import DecodeConfig, PrefillConfig
from colm_serve.core import (
    DecodedToken,
    DecodeRequest,
    KvLayout,
    PrefillPeer,
    PrefillRequest,
    SamplingParams,
)
from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.decode_worker.prompt_kv import PREFILL_METHOD
from colm_serve.decode_worker.service import DecodeService
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine.loading import load_for_serving
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel
from colm_serve.prefill_worker.service import PrefillService
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.proto.colm.v1 import decode_pb2_grpc, prefill_pb2
from colm_serve.transport import serde
from colm_serve.transport.channel import connect
from colm_serve.transport.host import ServiceThread
from colm_serve.transport.kv_frames import EndFrame, OpenFrame

MODEL = ColmConfig(
    vocab_size=32000, chains=(8, 8, 8, 8), d_model=2048, d_ff=8192, num_layers=4, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=16384, tie_embeddings=True,
)  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192)
#: TTFT of two processes over that of one, at most.
TARGET = 1.05
LEVEL = 4
NUM_THREADS = 2
CHUNK_TOKENS = 512
PAGE_SIZE = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def serve(kind: str, folder: Path) -> None:
    """A worker that says where it is and serves until its standard input ends."""
    torch.set_num_threads(NUM_THREADS)
    service: PrefillService | DecodeService
    worker: PrefillWorker | DecodeWorker
    if kind == "prefill":
        loaded = load_for_serving(folder, num_chains=1, with_head=False)
        p_config = PrefillConfig(kv_tokens=32768, chunk_tokens=CHUNK_TOKENS)
        worker = PrefillWorker(loaded, p_config, kind, epoch=1)
        service = PrefillService(worker, p_config)
    else:
        loaded = load_for_serving(folder, num_chains=None, with_head=True)
        # Both sides of the comparison compute in chunks of the same size, where they are told to.
        d_config = DecodeConfig(
            kv_tokens=32768,
            max_batch_tokens=CHUNK_TOKENS,
            adaptive_prefill=False,
            shared_memory=kind != "decode by messages",
        )
        worker = DecodeWorker(loaded, d_config, kind, epoch=1)
        service = DecodeService(worker, d_config)
    host = ServiceThread(service)
    print(json.dumps({"address": service.address, "kv_identity": loaded.kv_identity}), flush=True)
    sys.stdin.read()
    host.stop()


@dataclass(frozen=True)
class Served:
    """A worker's process."""

    address: str
    kv_identity: str
    process: psutil.Process

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[Served]:
    command = [sys.executable, __file__, "--serve", kind, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield Served(said["address"], said["kv_identity"], psutil.Process(process.pid))
        process.communicate()


class Client:
    """Asks the workers for what is measured; each prompt is of random tokens."""

    def __init__(self, prefill: Served) -> None:
        self._prefill = prefill
        self._random = random.Random(0)
        self._layout = KvLayout(MODEL.num_layers, MODEL.num_kv_heads, MODEL.head_dim, "float32")
        self._pool = KvPool(self._layout, max(LENGTHS) // PAGE_SIZE, PAGE_SIZE)

    async def ttft_s(
        self, decode: Served, num_tokens: int, *, is_shipped: bool
    ) -> tuple[float, float]:
        """Seconds to the first token, and those of the decode worker's processors meanwhile."""
        peers = (PrefillPeer(self._prefill.address),) if is_shipped else ()
        identity = decode.kv_identity
        request = DecodeRequest("r", self._prompt(num_tokens), LEVEL, GREEDY, peers, identity)
        async with connect(decode.address, None) as channel:
            await channel.channel_ready()
            stub: Any = decode_pb2_grpc.DecodeServiceStub(channel)
            cpu_s, begin = decode.cpu_s(), time.perf_counter()
            call = stub.Decode(serde.decode_start_to_proto(request))
            async for message in call:
                if isinstance(serde.decode_event_from_proto(message), DecodedToken):
                    return time.perf_counter() - begin, decode.cpu_s() - cpu_s
        raise RuntimeError("the stream ended without a token")

    async def exposed_s(self, num_tokens: int) -> float:
        """Seconds from the end of the compute to the last page written."""
        tokens = self._prompt(num_tokens)
        identity = self._prefill.kv_identity
        request = PrefillRequest("r", tokens, 0, identity, self._layout, stream_id=1)
        writer = FrameWriter(self._pool, self._pool.table(range(self._pool.num_pages)), request)
        async with connect(self._prefill.address, None) as channel:
            await channel.channel_ready()
            prefill = channel.unary_stream(
                PREFILL_METHOD,
                request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
                response_deserializer=bytes,
            )
            begin = 0.0
            async for message in prefill(serde.prefill_request_to_proto(request)):
                frame = await asyncio.to_thread(writer.accept, message)
                if isinstance(frame, OpenFrame):
                    begin = time.perf_counter()  # an idle worker's first pass begins with it
                elif isinstance(frame, EndFrame):
                    return time.perf_counter() - begin - frame.compute_s
        raise RuntimeError("the stream ended without its end frame")

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(MODEL.vocab_size) for _ in range(num_tokens))


async def measure(
    client: Client, decodes: dict[str, Served], lengths: tuple[int, ...], repeats: int
) -> list[Row]:
    rows = []
    for num_tokens in lengths:
        for path, decode in decodes.items():
            rows += await compare(client, decode, num_tokens, path, repeats)
        ttft_s = rows[-2].value / 1e3
        exposed = [await client.exposed_s(num_tokens) / ttft_s for _ in range(repeats)]
        rows.append(
            Row.of(f"{num_tokens} tokens, by messages: exposed transfer's share of TTFT",
                   [max(0.0, share) for share in exposed], "", "lower", target=0.03,
                   headline=num_tokens == max(lengths))
        )  # fmt: skip
    return rows


async def compare(
    client: Client, decode: Served, num_tokens: int, path: str, repeats: int
) -> list[Row]:
    """Time both in turn; the ratio is taken pair by pair."""
    alone, apart, cpu = [], [], []
    for repeat in range(1 + repeats):  # the first is not counted
        alone_s, _ = await client.ttft_s(decode, num_tokens, is_shipped=False)
        apart_s, cpu_s = await client.ttft_s(decode, num_tokens, is_shipped=True)
        if repeat:
            alone.append(alone_s)
            apart.append(apart_s)
            cpu.append(cpu_s / apart_s)
    ratios = [b / a for a, b in zip(alone, apart, strict=True)]
    name = f"{num_tokens} tokens, {path}"
    is_missed = median(ratios) > TARGET
    shared_cores = "what both processes do to move KV is taken from the prefill's own two cores"
    return [
        Row.of(f"{name}: TTFT of one process", [s * 1e3 for s in alone], "ms", "lower"),
        Row.of(f"{name}: TTFT of two over one", ratios, "x", "lower", target=TARGET,
               headline=True, note=shared_cores if is_missed else ""),
        Row.of(f"{name}: TTFT of two", [s * 1e3 for s in apart], "ms", "lower"),
        Row.of(f"{name}: cores that the decode worker kept busy", cpu, "", "lower",
               note="it checks and writes frames, and makes the first token"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.serve:
        kind, folder = arguments.serve
        serve(kind, Path(folder))
        return
    with Console().status("timing first tokens"), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        torch.manual_seed(0)
        save_model(ColmModel(MODEL), folder)
        prefill = stack.enter_context(serving("prefill", folder))
        decodes = {
            path: stack.enter_context(serving(f"decode {path}", folder))
            for path in ("by shared memory", "by messages")
        }
        client = Client(prefill)
        rows = asyncio.run(measure(client, decodes, tuple(arguments.lengths), arguments.repeats))
    show("TTFT: prefill in a process of its own against one process", rows)
    print(f"written to {save('ttft', rows)}")


if __name__ == "__main__":
    main()
