"""A worker in a process of its own: `python -m tests.worker_process KIND FOLDER DELAY_S CONFIG`.

It prints one line of JSON, {"address", "kv_identity"}, and serves until its standard input ends,
so that it can not outlive the test that started it. DELAY_S is slept before each block.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import decode_service, prefill_service


@dataclass(frozen=True)
class WorkerProcess:
    """A worker that serves."""

    process: subprocess.Popen[str]
    address: str
    kv_identity: str

    def kill(self) -> None:
        """SIGKILL, as a machine that dies would."""
        self.process.kill()
        self.process.wait(10)


class StartingProcess:
    """A worker on its way up; start several before waiting for the first."""

    def __init__(self, kind: str, folder: Path, delay_s: float = 0.0, **config: object) -> None:
        command = [sys.executable, "-m", "tests.worker_process", kind, str(folder)]
        self._process = subprocess.Popen(
            [*command, str(delay_s), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    def wait(self) -> WorkerProcess:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the worker ended with {self._process.wait(10)} before it served"
        said = json.loads(line)
        return WorkerProcess(self._process, said["address"], said["kv_identity"])

    def end(self) -> int:
        """Let it stop by itself, or kill it; reap it. Its exit status."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                return process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@contextmanager
def starting(
    kind: str, folder: Path, delay_s: float = 0.0, **config: object
) -> Iterator[StartingProcess]:
    process = StartingProcess(kind, folder, delay_s, **config)
    try:
        yield process
    finally:
        process.end()


def main() -> None:
    kind, folder, delay_s, raw_config = sys.argv[1:]
    open_service: Any = {"prefill": prefill_service, "decode": decode_service}[kind]
    config = json.loads(raw_config)
    with open_service(Path(folder), before_block=lambda: time.sleep(float(delay_s)), **config) as (
        service,
        worker,
    ):
        identity = worker.status().kv_identity
        print(json.dumps({"address": service.address, "kv_identity": identity}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
