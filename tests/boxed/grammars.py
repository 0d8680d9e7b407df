"""Tries grammars that say themselves how their compilation ends."""

from __future__ import annotations

import os
import signal

from colm_serve.box import Work, serve
from colm_serve.engine.grammar_backend import GrammarBackend
from colm_serve.engine.grammar_box import check_in_a_fork
from colm_serve.grammar import Grammar, GrammarKind


class Backend(GrammarBackend):
    def __init__(self) -> None:
        pass

    def check(self, grammar: Grammar) -> None:
        match grammar.text:
            case "eat":
                bytes(2**40)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                raise RuntimeError("as told")


def make_work() -> Work:
    def work(data: bytes) -> bytes:
        return check_in_a_fork(Backend(), Grammar(GrammarKind.REGEX, data.decode()), 60.0)

    return work


if __name__ == "__main__":
    serve(make_work)
