"""Token ids to text as they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from colm_serve.model.vocabulary import REPLACEMENT


@dataclass(frozen=True)
class Piece:
    """New text that is final; `is_stop` when a stop string follows it, which ends the text."""

    text: str
    is_stop: bool = False


class Detokenizer:
    """One generation's text; `push` its tokens, then `flush` once.

    The pieces together are the decoded text of all tokens up to the first stop string. Those of
    the first `min_tokens` tokens are text like any other.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str] | None,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._characters = CharacterStream(decode) if decode is not None else None
        self._stops = StopMatcher(stop)
        self._num_before_stop = min_tokens

    def push(self, token_id: int) -> Piece:
        if self._characters is None:
            return Piece("")
        text = self._characters.push(token_id)
        if self._num_before_stop > 0:
            self._num_before_stop -= 1
            return Piece(text)
        return self._stops.push(text)

    def flush(self) -> Piece:
        """What is still held back, now that no more tokens come."""
        if self._characters is None:
            return Piece("")
        last = self._stops.push(self._characters.flush())
        if last.is_stop:
            return last
        return Piece(last.text + self._stops.flush())


class CharacterStream:
    """Decodes a growing list of tokens, holding back characters that may be incomplete.

    A trailing U+FFFD may be the begin of a character whose other bytes are in tokens to come.
    Decoding goes by chunks that end where no such doubt is; each is decoded together with the
    one before, because some decoders treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_length = 0
        self._chunk: list[int] = []
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        self._chunk.append(token_id)
        text = self._chunk_text()
        whole = text.rstrip(REPLACEMENT)
        new = whole[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(whole))
        if whole == text and text:
            self._begin_chunk()
        return new

    def flush(self) -> str:
        new = self._chunk_text()[self._num_emitted :]
        self._begin_chunk()
        return new

    def _chunk_text(self) -> str:
        return self._decode(self._context + self._chunk)[self._context_length :]

    def _begin_chunk(self) -> None:
        self._context, self._chunk = self._chunk, []
        self._context_length = len(self._decode(self._context))
        self._num_emitted = 0


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> Piece:
        """The part of all text so far that no stop string can begin in any more."""
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            piece = Piece(self._held[: min(found)[1]], is_stop=True)
            self._held = ""
            return piece
        num_kept = self._num_possible()
        cut = len(self._held) - num_kept
        piece, self._held = Piece(self._held[:cut]), self._held[cut:]
        return piece

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _num_possible(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
