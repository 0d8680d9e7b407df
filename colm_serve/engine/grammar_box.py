"""Grammars tried in a box before a worker compiles them.

A few characters can mean minutes of work or all memory, and the library can neither be told a limit
nor be stopped. So a grammar is compiled twice: here, where it may fail, and then in the worker,
which has seen by now that it takes little. (What is compiled here is not handed over: of 700
optional properties that would be 245 MB of JSON, which take longer to read than to compile.)
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path

from colm_serve.box import Box, BoxFailed, Work, serve
from colm_serve.engine.grammar_backend import GrammarBackend
from colm_serve.errors import ColmError, InvalidArgument, ResourceExhausted, WorkerFailed
from colm_serve.grammar import Grammar, GrammarKind

MEMORY_BYTES = 256 * 2**20
#: On the clock, where the machine is busy with something else.
_TIMEOUT_S = 30.0

_PASSED, _TOO_SLOW = "passed", "too slow"
_SET_PARENT_DEATH_SIGNAL = 1


class TooSlow(ColmError):
    """A grammar takes more processor time than it was given."""


class GrammarBox:
    """Tries one grammar at a time in a process of its own, started by the first; thread-safe.

    Args:
        folder: that of the model; None, of one in memory only, is never asked for.
        cpu_s: processor time that a grammar may take.
    """

    def __init__(self, folder: Path | None, vocab_size: int, cpu_s: float) -> None:
        self.cpu_s = cpu_s
        self._box = Box(__name__, str(folder), vocab_size, cpu_s, memory_bytes=MEMORY_BYTES)

    def check(self, grammar: Grammar) -> None:
        """Try a grammar; blocks.

        Raises:
            InvalidArgument: as `GrammarBackend.check`, or it takes too much memory.
            TooSlow: it takes too much processor time.
            ResourceExhausted: the machine is too busy to say.
            WorkerFailed: the box does not work here, or is closed.
        """
        asked = json.dumps([grammar.kind.value, grammar.text, grammar.field])
        try:
            self._box.start()
        except BoxFailed as error:
            raise WorkerFailed(f"grammars cannot be compiled here: {error}") from error
        try:
            answer = self._box.call(asked.encode(), cpu_s=_TIMEOUT_S, timeout_s=_TIMEOUT_S)
        except BoxFailed as error:
            raise ResourceExhausted(f"no grammar could be compiled in time: {error}") from error
        verdict = json.loads(answer)
        if verdict == _TOO_SLOW:
            raise TooSlow(f"more than {self.cpu_s} s")
        if verdict != _PASSED:
            raise InvalidArgument(*verdict)

    def close(self) -> None:
        """End the process, and a check under way with WorkerFailed or ResourceExhausted."""
        self._box.close()


def make_work(folder: str, vocab_size: int, cpu_s: float) -> Work:
    backend = GrammarBackend.load(Path(folder), vocab_size)
    assert backend is not None, f"{folder} has no tokenizer"

    def work(data: bytes) -> bytes:
        kind, text, field = json.loads(data)
        return check_in_a_fork(backend, Grammar(GrammarKind(kind), text, field), cpu_s)

    return work


def check_in_a_fork(backend: GrammarBackend, grammar: Grammar, cpu_s: float) -> bytes:
    """The verdict on a grammar, as JSON.

    What is ended when it takes too much was forked for it: all else is there for the next.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            with open(theirs, "wb") as pipe:
                pipe.write(_verdict(backend, grammar))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        verdict = pipe.read()
    _, status = os.waitpid(child, 0)
    if not status:
        return verdict
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return json.dumps(_TOO_SLOW).encode()
    return _refusal(_too_large(grammar))


def _verdict(backend: GrammarBackend, grammar: Grammar) -> bytes:
    try:
        backend.check(grammar)
    except InvalidArgument as error:
        return _refusal(error)
    return json.dumps(_PASSED).encode()


def _refusal(error: InvalidArgument) -> bytes:
    return json.dumps([error.field, error.value, error.allowed]).encode()


def _too_large(grammar: Grammar) -> InvalidArgument:
    allowed = f"a grammar that compiles in {MEMORY_BYTES // 2**20} MiB"
    return InvalidArgument(grammar.field, grammar.text, allowed)


if __name__ == "__main__":
    serve(make_work)
