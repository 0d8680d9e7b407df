"""What a client has had of a request, and what it is still owed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from colm_serve.core import (
    DecodedToken,
    FinishReason,
    Logprobs,
    SamplingParams,
    ScoredPrompt,
    TokenLogprob,
)
from colm_serve.router.detokenizer import Detokenizer, Piece
from colm_serve.router.request import Token
from colm_serve.router.validation import CheckedRequest


class Output:
    """A request's tokens and scores, whichever decode workers they came from."""

    def __init__(
        self,
        checked: CheckedRequest,
        eos_token_ids: Iterable[int],
        detokenizer: Detokenizer,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.is_stopped = False
        self._checked = checked
        self._ending_token_ids = checked.sampling.ending_token_ids(eos_token_ids)
        self._detokenizer = detokenizer
        self._token_bytes = token_bytes
        self._token_ids: list[int] = []
        self._num_scored = 0
        self._num_scored_by_call = 0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and the output so far."""
        return (*self._checked.prompt, *self._token_ids)

    @property
    def max_tokens_left(self) -> int:
        return self._checked.sampling.max_tokens - len(self._token_ids)

    def sampling_left(self) -> SamplingParams:
        """How to go on: draws are keyed by (seed, position), so they continue where they were."""
        sampling = self._checked.sampling
        if not self._token_ids and not self._num_scored:
            return sampling
        is_scored = self._num_scored == len(self._checked.prompt)
        return replace(
            sampling,
            max_tokens=self.max_tokens_left,
            min_tokens=max(0, sampling.min_tokens - len(self._token_ids)),
            prompt_logprobs=None if is_scored else sampling.prompt_logprobs,
        )

    def begin_call(self) -> None:
        """Another decode worker is asked, which may score the prompt from its beginning."""
        self._num_scored_by_call = 0

    def scored(self, event: ScoredPrompt) -> ScoredPrompt:
        """The scores that the client has not had from a call before."""
        num_had = max(0, self._num_scored - self._num_scored_by_call)
        self._num_scored_by_call += len(event.logprobs)
        new = event.logprobs[num_had:]
        self._num_scored += len(new)
        return ScoredPrompt(tuple(map(self._with_bytes, new)))

    @property
    def is_scored_only(self) -> bool:
        """The prompt has been scored, and that is all there was to do."""
        return self._checked.is_scored_only and self._num_scored == len(self._checked.prompt)

    def token(self, event: DecodedToken) -> Token:
        self._token_ids.append(event.token_id)
        piece = self._detokenizer.push(event.token_id)
        self.is_stopped = piece.is_stop
        logprobs = None if event.logprobs is None else self._with_bytes(event.logprobs)
        return Token(event.token_id, piece.text, event.level, logprobs)

    def last_piece(self) -> Piece:
        """The text that was held back until it was known that no more comes."""
        return Piece("") if self.is_stopped else self._detokenizer.flush()

    def reason_to_end(self) -> FinishReason | None:
        """Why no more tokens are owed, should the decode worker be gone before it said so."""
        if self.is_stopped:
            return FinishReason.STOP
        if self.is_scored_only:
            return FinishReason.LENGTH
        if not self._token_ids:
            return None
        if self._token_ids[-1] in self._ending_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.max_tokens_left == 0 else None

    def _with_bytes(self, logprobs: Logprobs) -> Logprobs:
        def with_bytes(entry: TokenLogprob) -> TokenLogprob:
            return replace(entry, token=self._token_bytes(entry.token_id))

        return Logprobs(with_bytes(logprobs.chosen), tuple(map(with_bytes, logprobs.top)))
