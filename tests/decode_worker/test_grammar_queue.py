"""Grammars are compiled beside each other: a heavy one holds up its like, and once only."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from colm_serve.core import SamplingParams
from colm_serve.decode_worker import grammars
from colm_serve.decode_worker.grammars import QUICK_S, GrammarQueue
from colm_serve.engine.grammar_box import GrammarBox, TooSlow
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.errors import ColmError, InvalidArgument, ResourceExhausted, WorkerFailed
from colm_serve.grammar import Grammar, GrammarKind
from tests.helpers import TINY
from tests.router.cluster import save_tokenizer
from tests.router.scripted import END_OF_TEXT, VOCAB_SIZE
from tests.worker_clients import eventually

MODEL = replace(TINY, vocab_size=VOCAB_SIZE, eos_token_ids=(END_OF_TEXT,))
ROOT = Path(__file__).parents[2]
DEAR_PATTERN = "^" + "x" * 249 + "[a-z]{1,9000}[0-9]{1,9000}$"
DEAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "string", "pattern": DEAR_PATTERN}))


def asking(grammar: Grammar | str) -> SamplingParams:
    if isinstance(grammar, str):
        grammar = Grammar(GrammarKind.REGEX, grammar)
    return SamplingParams(9, grammar=grammar)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


class ScriptedBox(GrammarBox):
    """Says of a grammar what its text says; the slow ones wait until they are let go."""

    let_go: ClassVar[threading.Event]
    checked: ClassVar[list[tuple[str, float]]]

    def check(self, grammar: Grammar) -> None:
        self.checked.append((grammar.text, self.cpu_s))
        match grammar.text.rstrip("0123456789"):
            case "slow":
                if self.cpu_s <= QUICK_S:
                    raise TooSlow
                self.let_go.wait(60)
            case "endless":
                raise TooSlow
            case "wrong":
                raise InvalidArgument(grammar.field, grammar.text, "something else")
            case "broken":
                raise WorkerFailed("as told")


@contextmanager
def scripted(folder: Path, **changes: Any) -> Iterator[tuple[GrammarQueue, type[ScriptedBox]]]:
    class Scripted(ScriptedBox):
        let_go = threading.Event()
        checked: ClassVar = []

    queue = GrammarQueue(GrammarCompiler(folder, MODEL), make_box=Scripted, **changes)
    try:
        yield queue, Scripted
    finally:
        Scripted.let_go.set()
        queue.close()


async def outcome(queue: GrammarQueue, grammar: Grammar | str) -> type:
    try:
        return type(await queue.compile(asking(grammar)))
    except ColmError as error:
        return type(error)


async def test_others_compile_while_one_takes_long(folder: Path) -> None:
    with scripted(folder) as (queue, box):
        slow = asyncio.create_task(outcome(queue, "slow"))
        await eventually(lambda: len(box.checked) == 2, "it is tried in the slow lane")
        for text in ("a", "b", "wrong"):
            assert await outcome(queue, text) in (CompiledGrammar, InvalidArgument)
        assert not slow.done()
        box.let_go.set()
        assert await slow is CompiledGrammar


@pytest.mark.parametrize(
    ("text", "expected", "num_checks"),
    [("a", CompiledGrammar, 1), ("wrong", InvalidArgument, 1), ("endless", InvalidArgument, 2)],
)
async def test_a_grammar_is_tried_once(
    folder: Path, text: str, expected: type, num_checks: int
) -> None:
    with scripted(folder) as (queue, box):
        at_once = await asyncio.gather(*(outcome(queue, text) for _ in range(3)))
        assert [*at_once, await outcome(queue, text)] == [expected] * 4
        assert len(box.checked) == num_checks


async def test_the_refusal_names_the_limit_and_each_its_own_field(folder: Path) -> None:
    with scripted(folder) as (queue, _):
        for field in ("grammar.regex", "structured_outputs.regex"):
            grammar = Grammar(GrammarKind.REGEX, "endless", field)
            with pytest.raises(InvalidArgument, match=r"compiles in 4\.0 s") as caught:
                await queue.compile(asking(grammar))
            assert caught.value.field == field


async def test_a_box_that_fails_says_nothing_of_the_grammar(folder: Path) -> None:
    with scripted(folder) as (queue, box):
        assert [await outcome(queue, "broken") for _ in range(2)] == [WorkerFailed] * 2
        assert len(box.checked) == 2


async def test_what_is_remembered_has_a_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "_NUM_REMEMBERED", 2)
    with scripted(folder) as (queue, box):
        for text in ("a", "b", "a", "c", "a", "b"):
            await outcome(queue, text)
        assert [text for text, _ in box.checked] == ["a", "b", "c", "b"]


async def test_what_waits_has_a_bound_and_a_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MAX_WAITING", 2)
    with scripted(folder) as (queue, box):
        waiting = [asyncio.create_task(outcome(queue, "slow"))]
        await eventually(lambda: len(box.checked) == 2, "it is tried in the slow lane")
        waiting.append(asyncio.create_task(outcome(queue, "slow1")))
        await eventually(lambda: len(box.checked) == 3, "it is found to be slow")
        assert await outcome(queue, "slow2") is ResourceExhausted
        assert await outcome(queue, "a") is CompiledGrammar
        box.let_go.set()
        assert [await each for each in waiting] == [CompiledGrammar] * 2
    with scripted(folder, timeout_s=1.0) as (queue, _):
        assert await outcome(queue, "slow") is ResourceExhausted


async def test_a_pattern_in_a_schema_that_takes_minutes_is_refused_and_hurts_nobody(
    folder: Path,
) -> None:
    queue = GrammarQueue(GrammarCompiler(folder, MODEL))
    try:
        results = await asyncio.gather(outcome(queue, DEAR), outcome(queue, "[a-z]+"))
    finally:
        queue.close()
    assert list(results) == [InvalidArgument, CompiledGrammar]


async def test_closing_ends_what_is_tried(folder: Path) -> None:
    def tried() -> list[psutil.Process]:
        boxes = [p for p in psutil.Process().children() if "grammar_box" in " ".join(p.cmdline())]
        return [child for box in boxes for child in box.children()]

    queue = GrammarQueue(GrammarCompiler(folder, MODEL))
    compiling = asyncio.create_task(queue.compile(asking(DEAR)))
    await eventually(lambda: bool(tried()), "it is being compiled", timeout_s=60)
    children = psutil.Process().children(recursive=True)
    queue.close()
    with pytest.raises(asyncio.CancelledError):
        await compiling
    psutil.wait_procs([p for p in children if "grammar_box" in _command(p)], timeout=30)
    assert not tried()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_a_compile_under_way_does_not_keep_the_process(folder: Path) -> None:
    program = f"""
import asyncio, threading
from colm_serve.core import SamplingParams
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.engine.grammar_compiler import GrammarCompiler
from colm_serve.grammar import Grammar, GrammarKind
from pathlib import Path
from tests.decode_worker.test_grammar_queue import MODEL

class Endless(GrammarCompiler):
    def find_stops(self, sampling):
        begun.set()
        threading.Event().wait()

async def main():
    queue = GrammarQueue(Endless(Path({str(folder)!r}), MODEL))
    sampling = SamplingParams(9, grammar=Grammar(GrammarKind.REGEX, "a"))
    compiling = asyncio.create_task(queue.compile(sampling))
    await asyncio.to_thread(begun.wait)
    queue.close()

begun = threading.Event()
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0
