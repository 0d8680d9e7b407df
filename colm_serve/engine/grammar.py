"""Where in its grammar a sequence is, and which tokens may come next.

The time of a token has no bound in a grammar that is ambiguous, but grows from token to token. So
it is measured, and a text is given up while one takes a fraction of a second still.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from colm_serve.engine.grammar_compiler import CompiledGrammar
from colm_serve.errors import InvalidArgument

#: Processor time, of one token and of a text: so much, and so much more for each of its tokens.
MAX_TOKEN_S = 0.25
_FIRST_S, _PER_TOKEN_S = 2.0, 0.02
#: What a step can wait for, and a token drafted in vain may take.
_CHEAP_S = 0.002

_T = TypeVar("_T")


class GrammarState:
    """Follows the output of one sequence; used by one thread at a time.

    Args:
        tokens: the sequence's own growing list; each call follows what was added to it.
        num_prompt_tokens: how many of them are the prompt's.
        clock: processor time of the calling thread, in seconds.
    """

    def __init__(
        self,
        compiled: CompiledGrammar,
        tokens: Sequence[int],
        num_prompt_tokens: int,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._grammar = compiled.grammar
        self._matcher = compiled.new_matcher()
        self._tokens = tokens
        self._num_prompt_tokens = self._num_followed = num_prompt_tokens
        self._clock = clock
        self._spent_s = self._last_s = 0.0
        self._failure: InvalidArgument | None = None
        self._bits = torch.empty(1, -(-compiled.vocab_size // 32), dtype=torch.int32)
        self._ending_V = torch.zeros(compiled.vocab_size, dtype=torch.bool)
        self._ending_V[list(compiled.stop_token_ids)] = True
        #: After some drafts, none to begin with; None where nothing fits.
        self._allowed: dict[tuple[int, ...], Tensor | None] = {}

    @property
    def failure(self) -> InvalidArgument | None:
        """Why the text can have no end, or none in time."""
        return self._failure

    @property
    def is_cheap(self) -> bool:
        """The last token took so little that the next will not be felt."""
        return self._last_s <= _CHEAP_S

    def prepare(self) -> None:
        """Follow the tokens and work out which may be next, for `allowed` to know; may be slow."""
        for token in self._tokens[self._num_followed :]:
            if self._failure is not None:
                return
            self._allowed.clear()
            self._last_s = 0.0
            is_accepted = self._charged(partial(self._matcher.accept_token, token))
            self._num_followed += 1
            self._check(is_accepted)
        if self._failure is None and () not in self._allowed:
            allowed_V = self._allowed[()] = self._charged(self._find_allowed)
            self._check(allowed_V is not None)

    def allowed(self, drafts: Sequence[int] = ()) -> Tensor:
        """Which tokens may follow the sequence's own and `drafts`, as booleans on the CPU.

        Drafts that do not fit are left out, with all after them: a token that follows one of
        those is never used. Where nothing fits any more only the tokens that end the text are
        left.
        """
        allowed_V = self._allowed_after(tuple(drafts))
        return self._ending_V if allowed_V is None else allowed_V

    def can_follow(self, drafts: Sequence[int]) -> bool:
        """Whether some token may come after `drafts`, and it takes little to know which."""
        drafts = tuple(drafts)
        is_at_hand = not drafts or drafts in self._allowed or self.is_cheap
        return is_at_hand and self._allowed_after(drafts) is not None

    def _allowed_after(self, drafts: tuple[int, ...]) -> Tensor | None:
        self.prepare()
        if self._failure is not None:
            return None
        if drafts not in self._allowed:
            # Not charged: what is drafted must not decide whether a text fails.
            begin = self._clock()
            self._allowed[drafts] = self._try(drafts)
            self._last_s = self._clock() - begin
        return self._allowed[drafts]

    def _try(self, drafts: tuple[int, ...]) -> Tensor | None:
        num_drafts = 0
        try:
            for draft in drafts:
                if self._matcher.is_terminated() or not self._matcher.accept_token(draft):
                    break
                num_drafts += 1
            return self._find_allowed()
        finally:
            if num_drafts:
                self._matcher.rollback(num_drafts)

    def _find_allowed(self) -> Tensor | None:
        if self._matcher.is_terminated():
            return self._ending_V
        self._matcher.fill_next_token_bitmask(self._bits)
        allowed_V = _unpack(self._bits[0], len(self._ending_V))
        return allowed_V if bool(allowed_V.any()) else None

    def _charged(self, work: Callable[[], _T]) -> _T:
        begin = self._clock()
        result = work()
        took_s = self._clock() - begin
        self._last_s += took_s
        self._spent_s += took_s
        return result

    def _check(self, has_next: bool) -> None:
        """Give the text up when it cannot go on, or when following it has taken too long."""
        num_tokens = self._num_followed - self._num_prompt_tokens
        if self._last_s > MAX_TOKEN_S:
            self._fail(f"a less ambiguous grammar: one token took {self._last_s:.2f} s to follow")
        elif self._spent_s > _FIRST_S + num_tokens * _PER_TOKEN_S:
            took = f"{num_tokens} tokens took {self._spent_s:.2f} s to follow"
            self._fail(f"a less ambiguous grammar: {took}")
        elif not has_next:
            self._fail("a grammar that the model's tokens can complete: there is a dead end")

    def _fail(self, allowed: str) -> None:
        self._failure = InvalidArgument(self._grammar.field, self._grammar.text, allowed)


def _unpack(bits: Tensor, vocab_size: int) -> Tensor:
    """Booleans from 32-bit words, the lowest bit first."""
    places = torch.arange(32, dtype=torch.int32)
    return ((bits[:, None] >> places) & 1).bool().flatten()[:vocab_size]
