"""Whether a grammar has a text at all: one whose rules only lead to each other has none."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

#: The form that this reads, by the library's own number.
_FORMAT = "v16"

#: Kinds of expressions that have others inside; characters and the like have none.
_RULE, _SEQUENCE, _CHOICES, _REPEAT = 4, 5, 6, 8


def is_empty(serialized: str) -> bool:
    """Whether no text is complete by the rules of an xgrammar grammar, as it serializes it.

    A set of characters counts as one that has some, and so does all that is not known here.
    """
    grammar = json.loads(serialized)
    return grammar["__VERSION__"] == _FORMAT and _Rules(grammar).is_root_empty()


class _Rules:
    """A grammar's rules, and those of them that are known to have a text."""

    def __init__(self, grammar: dict[str, Any]) -> None:
        self._data: Sequence[int] = grammar["grammar_expr_data"]
        self._starts: Sequence[int] = grammar["grammar_expr_indptr"]
        self._bodies: list[int] = [rule[1] for rule in grammar["rules"]]
        self._root: int = grammar["root_rule_id"]
        self._with_text: set[int] = set()

    def is_root_empty(self) -> bool:
        users = defaultdict(list)
        for rule, body in enumerate(self._bodies):
            for used in self._used(body):
                users[used].append(rule)
        # A rule is looked at again only when one that it uses has turned out to have a text.
        waiting = set(range(len(self._bodies)))
        while waiting:
            found = {rule for rule in waiting if self._has_text(self._bodies[rule])}
            self._with_text |= found
            waiting = {user for rule in found for user in users[rule]} - self._with_text
        return self._root not in self._with_text

    def _has_text(self, expression: int) -> bool:
        kind, parts = self._read(expression)
        if kind == _SEQUENCE:
            return all(map(self._has_text, parts))
        if kind == _CHOICES:
            return any(map(self._has_text, parts))
        if kind == _REPEAT:
            rule, least, _ = parts
            return least == 0 or rule in self._with_text
        return kind != _RULE or parts[0] in self._with_text

    def _used(self, expression: int) -> Iterator[int]:
        kind, parts = self._read(expression)
        if kind in (_RULE, _REPEAT):
            yield parts[0]
        elif kind in (_SEQUENCE, _CHOICES):
            for part in parts:
                yield from self._used(part)

    def _read(self, expression: int) -> tuple[int, list[int]]:
        """An expression's kind and what it is made of."""
        start = self._starts[expression]
        kind, length = self._data[start : start + 2]
        return kind, list(self._data[start + 2 : start + 2 + length])
