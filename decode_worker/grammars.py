"""Compile the grammars of requests beside the batch: neither on the loop nor under its lock."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from colm_serve.core import SamplingParams
from colm_serve.engine.grammar_compiler import CompiledGrammar, GrammarCompiler
from colm_serve.errors import InvalidArgument, ResourceExhausted

COMPILE_TIMEOUT_S = 10.0


class GrammarQueue:
    """Compiles one grammar at a time; belongs to one event loop."""

    def __init__(self, compiler: GrammarCompiler, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._compiler = compiler
        self._timeout_s = timeout_s
        # One thread: what compiles takes time from the batch.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def close(self) -> None:
        """Drop what waits; what compiles ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def compile(self, sampling: SamplingParams) -> CompiledGrammar | None:
        """The request's grammar; None, at once, when it has none.

        Raises:
            InvalidArgument: as `GrammarCompiler.compile`, or it took too long.
            ResourceExhausted: others took so long that its turn did not come.
        """
        grammar = sampling.grammar
        if grammar is None:
            return None
        compiling = self._threads.submit(self._compiler.compile, sampling)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(compiling), self._timeout_s)
        except TimeoutError as error:
            if compiling.cancelled():
                raise ResourceExhausted("grammars of other requests are being compiled") from error
            allowed = f"a grammar that compiles within {self._timeout_s} s"
            raise InvalidArgument(grammar.field, grammar.text, allowed) from error
