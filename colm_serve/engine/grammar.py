"""Where in its grammar a sequence is, and which tokens may come next.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from colm_serve.engine.grammar_compiler import CompiledGrammar
from colm_serve.errors import InvalidArgument

#: An ambiguous grammar takes longer with every token, and every row of the batch waits for it.
MAX_TOKEN_S = 0.25


class GrammarState:
    """Follows the output of one sequence.

    Args:
        tokens: the sequence's own growing list; each `allowed` follows what was added to it.
        num_prompt_tokens: how many of them are the prompt's.
    """

    def __init__(
        self, compiled: CompiledGrammar, tokens: Sequence[int], num_prompt_tokens: int
    ) -> None:
        self._grammar = compiled.grammar
        self._matcher = compiled.new_matcher()
        self._tokens = tokens
        self._num_followed = num_prompt_tokens
        self._failure: InvalidArgument | None = None
        self._bits = torch.empty(1, -(-compiled.vocab_size // 32), dtype=torch.int32)
        self._ending_V = torch.zeros(compiled.vocab_size, dtype=torch.bool)
        self._ending_V[list(compiled.stop_token_ids)] = True

    def allowed(self, drafts: Sequence[int] = ()) -> Tensor:
        """Which tokens may follow the sequence's own and `drafts`, as booleans on the CPU.

        Drafts that do not fit are left out, with all after them: a token that follows one of
        those is never used. Where nothing fits any more only the tokens that end the text are
        left, and `failure` tells why.
        """
        self._follow()
        if self._failure is not None:
            return self._ending_V
        num_drafts = 0
        try:
            for draft in drafts:
                if self._matcher.is_terminated() or not self._accept(draft):
                    break
                num_drafts += 1
            if self._matcher.is_terminated():
                return self._ending_V
            self._matcher.fill_next_token_bitmask(self._bits)
        finally:
            if num_drafts:
                self._matcher.rollback(num_drafts)
        allowed_V = _unpack(self._bits[0], len(self._ending_V))
        return allowed_V if bool(allowed_V.any()) else self._ending_V

    def failure(self) -> InvalidArgument | None:
        """Why the text, which has ended, is none of the grammar's nor the beginning of one."""
        self._follow()
        return self._failure

    def _follow(self) -> None:
        for token in self._tokens[self._num_followed :]:
            if self._failure is not None:
                return
            if not self._accept(token):
                self._fail("a grammar that the model's tokens can complete: there is a dead end")
            self._num_followed += 1

    def _accept(self, token: int) -> bool:
        begin = time.perf_counter()
        is_accepted = self._matcher.accept_token(token)
        if (seconds := time.perf_counter() - begin) > MAX_TOKEN_S:
            self._fail(f"a less ambiguous grammar: one token took {seconds:.2f} s to follow")
        return is_accepted

    def _fail(self, allowed: str) -> None:
        self._failure = InvalidArgument(self._grammar.field, self._grammar.text, allowed)


def _unpack(bits: Tensor, vocab_size: int) -> Tensor:
    """Booleans from 32-bit words, the lowest bit first."""
    places = torch.arange(32, dtype=torch.int32)
    return ((bits[:, None] >> places) & 1).bool().flatten()[:vocab_size]
