"""Token ids to text as they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from colm_serve.model.vocabulary import REPLACEMENT

#: Tokens that are decoded anew with each one more; a character has four bytes at most.
_SHORT_CHUNK = 16


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
    one before, because some decoders treat the first token of a text differently. A chunk that
    does not end is decoded at every doubling only, so that all of it costs what its tokens do.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_length = 0
        self._chunk: list[int] = []
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        self._chunk.append(token_id)
        if not self._is_worth_decoding():
            return ""
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

    def _is_worth_decoding(self) -> bool:
        """Whether the chunk is short, twice as long as it was, or seems to end in a character."""
        length = len(self._chunk)
        if length < _SHORT_CHUNK or length & (length - 1) == 0:
            return True
        end = self._decode(self._chunk[-_SHORT_CHUNK:])
        return bool(end) and not end.endswith(REPLACEMENT)

    def _chunk_text(self) -> str:
        return self._decode(self._context + self._chunk)[self._context_length :]

    def _begin_chunk(self) -> None:
        self._context, self._chunk = self._chunk, []
        self._context_length = len(self._decode(self._context))
        self._num_emitted = 0


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Knuth, Morris and Pratt's: a character costs each string the same, whatever they have in common.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._borders = [_borders(s) for s in self._stop]
        self._first = "".join(s[0] for s in self._stop)
        #: How much of each stop string the text ends with.
        self._num_matched = [0] * len(self._stop)
        self._held = ""

    def push(self, text: str) -> Piece:
        """The part of all text so far that no stop string can begin in any more."""
        if not self._held and not any(first in text for first in self._first):
            return Piece(text)
        start, self._held = len(self._held), self._held + text
        for position, character in enumerate(text, start + 1):
            num_complete = self._take(character)
            if num_complete:
                piece = Piece(self._held[: position - num_complete], is_stop=True)
                self._num_matched = [0] * len(self._stop)
                self._held = ""
                return piece
        cut = len(self._held) - max(self._num_matched)
        piece, self._held = Piece(self._held[:cut]), self._held[cut:]
        return piece

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _take(self, character: str) -> int:
        """Characters of the longest stop string that this one completes; 0 if it does none."""
        longest = 0
        for index, (stop, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            num_matched = self._num_matched[index]
            while num_matched and stop[num_matched] != character:
                num_matched = borders[num_matched - 1]
            num_matched += stop[num_matched] == character
            self._num_matched[index] = num_matched
            if num_matched == len(stop):
                longest = max(longest, num_matched)
        return longest


def _borders(text: str) -> list[int]:
    """Of each beginning of a text: the length of its longest end, but itself, that begins it."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return borders
