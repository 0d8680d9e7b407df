"""Compile the grammars of requests beside the batch: neither on the loop nor under its lock."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from colm_serve.core import SamplingParams
from colm_serve.decode_worker.daemon_threads import DaemonThreads
from colm_serve.engine.grammar_box import GrammarBox, TooSlow
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.errors import InvalidArgument, ResourceExhausted
from colm_serve.grammar import Grammar, GrammarKind

#: Processor time that a grammar is given at first, and then beside others that need more.
QUICK_S, SLOW_S = 0.5, 4.0
MAX_WAITING = 32
#: On the clock: for those before it, and for the library to be loaded.
TIMEOUT_S = 60.0
_NUM_REMEMBERED = 256

_T = TypeVar("_T")
_Key = tuple[GrammarKind, str, str]


class GrammarQueue:
    """Compiles grammars one at a time, and beside them one that takes long.

    Belongs to one event loop. What became of a grammar is remembered, for one that is refused
    not to cost its time again.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        timeout_s: float = TIMEOUT_S,
        make_box: Callable[[Path | None, int, float], GrammarBox] = GrammarBox,
    ) -> None:
        self._timeout_s = timeout_s
        self._lanes = [
            _Lane(compiler, make_box(compiler.folder, compiler.vocab_size, cpu_s))
            for cpu_s in (QUICK_S, SLOW_S)
        ]
        #: Of each grammar the lane that it is compiled in, or why it is not.
        self._found: OrderedDict[_Key, asyncio.Task[_Lane | InvalidArgument]] = OrderedDict()

    def close(self) -> None:
        """Drop what waits and end what is tried; nothing is waited for."""
        for task in self._found.values():
            task.cancel()
        for lane in self._lanes:
            lane.close()

    async def compile(self, sampling: SamplingParams) -> CompiledGrammar | None:
        """The request's grammar; None, at once, when it has none.

        Raises:
            InvalidArgument: as `GrammarCompiler.find_stops` and `GrammarBox.check`, or it takes
                longer than `SLOW_S`.
            ResourceExhausted: those of others take so long that its turn did not come.
            WorkerFailed: grammars cannot be compiled here.
        """
        if sampling.grammar is None:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._lanes[0].run(lambda lane: lane.compiler.find_stops(sampling))
                lane = await self._find(sampling.grammar)
                return await lane.run(lambda lane: lane.compiler.compile(sampling))
        except TimeoutError as error:
            raise ResourceExhausted("grammars of other requests are being compiled") from error

    async def _find(self, grammar: Grammar) -> _Lane:
        key = (grammar.kind, grammar.text, grammar.field)
        task = self._found.get(key)
        if task is None:
            task = self._found[key] = asyncio.create_task(self._try(grammar))
            task.add_done_callback(lambda done: self._keep(key, done))
        self._found.move_to_end(key)
        # Others may wait for it too.
        found = await asyncio.shield(task)
        if isinstance(found, InvalidArgument):
            raise InvalidArgument(found.field, found.value, found.allowed)
        return found

    async def _try(self, grammar: Grammar) -> _Lane | InvalidArgument:
        for lane in self._lanes:
            try:
                await lane.run(lambda lane: lane.box.check(grammar))
                return lane
            except TooSlow:
                continue
            except InvalidArgument as error:
                return error
        allowed = f"a grammar that compiles in {SLOW_S} s of processor time"
        return InvalidArgument(grammar.field, grammar.text, allowed)

    def _keep(self, key: _Key, task: asyncio.Task[_Lane | InvalidArgument]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._found[key]
        while len(self._found) > _NUM_REMEMBERED and next(iter(self._found.values())).done():
            self._found.popitem(last=False)


class _Lane:
    """A thread and a box for grammars that take about as long."""

    def __init__(self, compiler: GrammarCompiler, box: GrammarBox) -> None:
        self.compiler = compiler
        self.box = box
        # One thread: what compiles takes time from the batch.
        self._threads = DaemonThreads(1, "grammars")
        self._num_waiting = 0

    async def run(self, work: Callable[[_Lane], _T]) -> _T:
        """The result of work on the lane's thread; ResourceExhausted if too much waits for it."""
        if self._num_waiting >= MAX_WAITING:
            raise ResourceExhausted(f"{MAX_WAITING} grammars are already waiting to be compiled")
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._threads.submit(lambda: work(self)))
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._threads.close()
        self.box.close()
