"""Finds where texts spell control tokens, and breaks the spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

#: A noncharacter of Unicode: no text that is interchanged has it.
BREAK = "\ufdee"


class Spellings:
    """Those of some tokens. Capitals do not matter."""

    def __init__(self, spellings: Iterable[str]) -> None:
        lowered = [lower(text) for text in spellings]
        self._any = re.compile(any_of(lowered))
        self._start = re.compile(f"(?={self._any.pattern})")
        self._longest = max(map(len, lowered), default=0)
        self._firsts = frozenset(text[0] for text in lowered)
        #: What is missing of a token, by what there is of it.
        self._rests: dict[str, list[str]] = {}
        for text in lowered:
            for length in range(1, len(text)):
                self._rests.setdefault(text[:length], []).append(text[length:])

    def are_in(self, text: str) -> bool:
        return self._any.search(lower(text)) is not None

    def break_all(self, texts: Sequence[str]) -> list[str]:
        """The texts with `BREAK` in each token that they spell, alone or several in a row.

        It stands behind a token's first character. White space around texts does not matter, as
        templates trim it.
        """
        lowered = [lower(text) for text in texts]
        begun = [list(self._begun(text)) for text in lowered]
        continued = self._continued({beginning for ends in begun for _, beginning in ends}, lowered)
        return [
            _with_breaks(
                text,
                {
                    *(match.start() + 1 for match in self._starts(low)),
                    *(at + 1 for at, beginning in ends if beginning in continued),
                },
            )
            for text, low, ends in zip(texts, lowered, begun, strict=True)
        ]

    def _starts(self, lowered: str) -> Iterable[re.Match[str]]:
        # Looking ahead finds tokens that overlap too, and is slow.
        return self._start.finditer(lowered) if self._any.search(lowered) else ()

    def _begun(self, lowered: str) -> Iterator[tuple[int, str]]:
        """Where a text ends with the beginning of a token, and that beginning."""
        for text in {lowered, lowered.rstrip()}:
            begin = max(0, len(text) - self._longest)
            for position, character in enumerate(text[begin:], begin):
                if character in self._firsts and text[position:] in self._rests:
                    yield position, text[position:]

    def _continued(self, beginnings: set[str], lowered: Sequence[str]) -> set[str]:
        """Of beginnings of tokens those that a text goes on with, or is wholly within."""
        if not beginnings:
            return set()
        heads: set[str] = set()
        wholes: set[str] = set()
        for text in lowered:
            for head in (text[: self._longest], text.lstrip()[: self._longest]):
                heads.update(head[:length] for length in range(1, len(head) + 1))
            if len(stripped := text.strip()) < self._longest:
                wholes.add(stripped)

        def is_met(rest: str) -> bool:
            return rest in heads or any(rest[:n] in wholes for n in range(1, len(rest)))

        return {begun for begun in beginnings if any(map(is_met, self._rests[begun]))}


def any_of(texts: Iterable[str]) -> str:
    """A pattern of any of some texts, earlier ones preferred; of none, one that nothing matches."""
    return "|".join(map(re.escape, texts)) or "(?!)"


def lower(text: str) -> str:
    """In lower case, and as long as before: only a capital I with a dot would become two."""
    return text.replace("\u0130", "i").lower()


def _with_breaks(text: str, positions: Iterable[int]) -> str:
    bounds = [0, *sorted(positions), len(text)]
    return BREAK.join(text[a:b] for a, b in pairwise(bounds))
