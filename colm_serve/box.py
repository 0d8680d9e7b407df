"""A child process that does work nobody can bound beforehand, and is killed when it takes too long.

A thread cannot be stopped, and holds the interpreter of those who wait for it. What is in a box has
an interpreter of its own, limits on CPU time and memory that the system enforces, and nothing that
its end could damage: it is handed bytes and hands bytes back.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from colm_serve.errors import ColmError

#: What the function in the box does with one call's bytes.
Work = Callable[[bytes], bytes]

_CPU_S = struct.Struct("d")
_OK, _FAILED = b"+", b"-"
#: To import what the work needs and load what it starts with.
START_TIMEOUT_S = 60.0
_CLOSE_INTERVAL_S = 0.05
_EXIT_TIMEOUT_S = 5.0


class BoxFailed(ColmError):
    """The work came to no end within its limits, or its process died: the next call has another."""


class Box:
    """Runs calls one at a time in a process that is started by the first; thread-safe.

    Args:
        module: run as the process's program; it calls `serve`.
        arguments: of the function that it hands to `serve`; as JSON takes them.
        memory_bytes: that a call may take beyond what the process has once it is ready.
    """

    def __init__(self, module: str, *arguments: object, memory_bytes: int) -> None:
        self._module = module
        self._arguments = json.dumps([memory_bytes, *arguments])
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._is_closed = False

    def call(self, data: bytes, *, cpu_s: float, timeout_s: float) -> bytes:
        """What the work makes of `data`; blocks.

        Args:
            cpu_s: processor time after which the system kills the process, to the next second.
            timeout_s: time on the clock after which it is killed; waiting for the calls before
                this one, and for a new process to be ready, does not count.

        Raises:
            BoxFailed: it was killed, it died, or the work raised.
        """
        with self._turn:
            if self._is_closed:
                raise BoxFailed("the box is closed")
            child = self._child
            try:
                if child is None:
                    child = self._child = _Child(self._module, self._arguments)
                    child.wait_until_ready()
                return child.call(data, cpu_s, timeout_s)
            except (OSError, EOFError) as error:
                self._child = None
                how = f"did not start: {error}" if child is None else child.end()
                raise BoxFailed(f"its process {how}") from error

    def start(self) -> None:
        """Have the process ready before the first call needs it; raises as `call`."""
        self.call(b"", cpu_s=START_TIMEOUT_S, timeout_s=START_TIMEOUT_S)

    @property
    def pid(self) -> int | None:
        """The process's; None while there is none."""
        child = self._child
        return None if child is None else child.pid

    def close(self) -> None:
        """Kill the process; a call under way ends with BoxFailed, and so do later ones."""
        self._is_closed = True
        while not self._turn.acquire(timeout=_CLOSE_INTERVAL_S):
            # Again, as the call under way may have just begun to start a process.
            if (child := self._child) is not None:
                child.kill()
        if self._child is not None:
            self._child.kill()
            self._child.end()
            self._child = None
        self._turn.release()

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Child:
    """One process and the parent's end of its connection."""

    def __init__(self, module: str, arguments: str) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(number), arguments],
                pass_fds=(number,),
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._is_late = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises EOFError when it has ended, or takes too long."""
        self._receive(START_TIMEOUT_S)

    def call(self, data: bytes, cpu_s: float, timeout_s: float) -> bytes:
        self._connection.send_bytes(_CPU_S.pack(cpu_s) + data)
        answer = self._receive(timeout_s)
        if answer[:1] == _FAILED:
            raise BoxFailed(answer[1:].decode("utf-8", "replace"))
        return answer[1:]

    def kill(self) -> None:
        """Whoever waits for an answer sees the end of the connection."""
        self._process.kill()

    def end(self) -> str:
        """Leave nothing of it; how it ended."""
        if not self._is_late:
            # The connection ends a moment before the process does.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_TIMEOUT_S)
        self.kill()
        code = self._process.wait()
        self._connection.close()
        if self._is_late:
            return "took longer than it may"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def _receive(self, timeout_s: float) -> bytes:
        if not self._connection.poll(timeout_s):
            self._is_late = True
            raise EOFError
        return self._connection.recv_bytes()


def serve(make_work: Callable[..., Work]) -> None:
    """Be the process of a box: make the work, and do it until the box's owner is gone."""
    connection = Connection(int(sys.argv[1]))
    memory_bytes, *arguments = json.loads(sys.argv[2])
    work = make_work(*arguments)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory_bytes,) * 2)
    with suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        _answer(connection, work)


def _answer(connection: Connection, work: Work) -> None:
    while True:
        message = connection.recv_bytes()
        _limit_cpu(*_CPU_S.unpack_from(message))
        data = message[_CPU_S.size :]
        try:
            answer = _OK + (work(data) if data else b"")
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller hears of it
            answer = _FAILED + f"{type(error).__name__}: {error}".encode("utf-8", "replace")
        connection.send_bytes(answer)


def _limit_cpu(cpu_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + cpu_s
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), hard))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
