"""Workers in processes that start quickly, to be killed by the dozen."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The server from which workers are forked has imported the most of what they need, but nothing
# that starts threads: our kernels start OpenMP's, which do not survive a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "numba", "grpc.aio", "pydantic", "xgrammar", "tokenizers", "safetensors.torch"]
)
_START_TIMEOUT_S = 60


@dataclass(frozen=True)
class ForkedWorker:
    """A worker that serves until it is killed, or the process that started it is gone."""

    process: BaseProcess
    address: str
    kv_identity: str

    def kill(self) -> None:
        """SIGKILL, as a machine that dies would."""
        self.process.kill()
        self.process.join(10)


@contextmanager
def forked(kind: str, folder: Path, **config: Any) -> Iterator[ForkedWorker]:
    """A "prefill" or "decode" worker; killed in the end if it was not before."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(kind, folder, config, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(_START_TIMEOUT_S), "the worker did not start in time"
        worker = ForkedWorker(process, *ours.recv())
        yield worker
    finally:
        process.kill()
        process.join(10)
        ours.close()


def _serve(kind: str, folder: Path, config: dict[str, Any], parent: Connection) -> None:
    from tests.helpers import decode_service, prefill_service

    serve: Any = {"prefill": prefill_service, "decode": decode_service}[kind]
    with serve(folder, **config) as (service, worker):
        parent.send((service.address, worker.kv_identity))
        parent.poll(None)
