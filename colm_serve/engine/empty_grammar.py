"""Whether a grammar has a text at all: one whose rules only lead to each other has none."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

#: The form that this reads, by the library's own number.
_FORMAT = "v16"

#: Kinds of expressions that have others inside; characters and the like have none.
_RULE, _SEQUENCE, _CHOICES, _REPEAT = 4, 5, 6, 8


def is_empty(serialized: str) -> bool:
    """Whether no text is complete by the rules of an xgrammar grammar, as it serializes it.

    Takes time that grows with the text's length alone; that of a grammar that the library has
    optimized has its automaton once for every rule. A set of characters counts as one that has
    some, and so does all that is not known here.
    """
    grammar = json.loads(serialized)
    return grammar["__VERSION__"] == _FORMAT and _is_root_empty(grammar)


def _is_root_empty(grammar: dict[str, Any]) -> bool:
    bodies: list[int] = [rule[1] for rule in grammar["rules"]]
    num_lacking: list[int] = []  # of each expression: parts that have to have a text, and do not
    users = defaultdict(list)  # of each expression: those that it is a part of
    for expression, (kind, parts) in enumerate(_expressions(grammar)):
        if kind in (_RULE, _REPEAT):
            is_optional = kind == _REPEAT and parts[1] == 0
            num_lacking.append(0 if is_optional else 1)
            users[bodies[parts[0]]].append(expression)
        elif kind in (_SEQUENCE, _CHOICES):
            num_lacking.append(len(parts) if kind == _SEQUENCE else 1)
            for part in parts:
                users[part].append(expression)
        else:
            num_lacking.append(0)
    with_text = [expression for expression, number in enumerate(num_lacking) if number == 0]
    for expression in with_text:  # which grows
        for user in users[expression]:
            num_lacking[user] -= 1
            if num_lacking[user] == 0:
                with_text.append(user)
    root: int = grammar["root_rule_id"]
    return num_lacking[bodies[root]] > 0


def _expressions(grammar: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """Each expression's kind and what it is made of."""
    data = grammar["grammar_expr_data"]
    for start in grammar["grammar_expr_indptr"]:
        kind, length = data[start : start + 2]
        yield kind, data[start + 2 : start + 2 + length]
