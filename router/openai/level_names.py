"""A chain level as part of a model's name, for clients that can choose nothing but a model."""

from __future__ import annotations

import re

_NAMED = re.compile(r"(.+):level-([1-9][0-9]{0,2})")


def split_level(model: str) -> tuple[str, int | None]:
    """The model that a name is of, and the level it asks for if any.

    >>> split_level("stdlib-air:level-2")
    ('stdlib-air', 2)
    >>> split_level("stdlib-air")
    ('stdlib-air', None)
    """
    match = _NAMED.fullmatch(model)
    return (model, None) if match is None else (match[1], int(match[2]))
