"""Work in a box: it ends within its limits, and takes nobody along."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from colm_serve.box import Box, BoxFailed

MIB = 2**20
ROOT = Path(__file__).parent.parent


@pytest.fixture
def box() -> Iterator[Box]:
    with Box("tests.boxed.trouble", memory_bytes=256 * MIB) as box:
        yield box


def call(box: Box, data: bytes, *, cpu_s: float = 60, timeout_s: float = 60) -> bytes:
    return box.call(data, cpu_s=cpu_s, timeout_s=timeout_s)


def test_bytes_go_in_and_out() -> None:
    with Box("tests.boxed.echo", ">", memory_bytes=256 * MIB) as box:
        assert call(box, b"a\nb\0" * 100_000) == b">" + b"a\nb\0" * 100_000


def test_calls_share_a_process(box: Box) -> None:
    assert box.pid is None
    box.start()
    pid = box.pid
    assert [call(box, b"pid") for _ in range(3)] == [str(pid).encode()] * 3


@pytest.mark.parametrize(
    ("what", "limits", "why"),
    [
        (b"spin", {"cpu_s": 0.5}, "killed by signal 24"),
        (b"sleep", {"timeout_s": 0.2}, "took longer than it may"),
        (b"die", {}, "killed by signal 9"),
        (b"exit", {}, "ended with status 3"),
    ],
)
def test_what_does_not_end_well_costs_a_process(
    box: Box, what: bytes, limits: dict[str, float], why: str
) -> None:
    first = call(box, b"pid")
    with pytest.raises(BoxFailed, match=why):
        call(box, what, **limits)
    assert not psutil.pid_exists(int(first))
    assert call(box, b"pid") != first


@pytest.mark.parametrize(("what", "why"), [(b"raise", "as told"), (b"eat", "MemoryError")])
def test_what_raises_costs_only_itself(box: Box, what: bytes, why: str) -> None:
    first = call(box, b"pid")
    with pytest.raises(BoxFailed, match=why):
        call(box, what)
    assert call(box, b"pid") == first


def test_cpu_time_is_counted_by_call(box: Box) -> None:
    for _ in range(3):
        assert call(box, b"x", cpu_s=1) == b"x"


def test_work_that_cannot_be_made_is_told() -> None:
    with (
        Box("tests.boxed.unable", memory_bytes=MIB) as box,
        pytest.raises(BoxFailed, match="ended with status 1"),
    ):
        box.start()


def test_closing_ends_the_call_under_way(box: Box) -> None:
    box.start()
    failures: list[BoxFailed] = []

    def sleep() -> None:
        try:
            call(box, b"sleep")
        except BoxFailed as error:
            failures.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    box.close()
    thread.join(30)
    assert len(failures) == 1
    with pytest.raises(BoxFailed, match="closed"):
        call(box, b"x")


def test_it_ends_with_its_owner() -> None:
    program = (
        "import os; from colm_serve.box import Box\n"
        "box = Box('tests.boxed.trouble', memory_bytes=2**28); box.start()\n"
        "print(box.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, check=False
    )
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(owner.stdout)).wait(30)
