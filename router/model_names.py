"""What a request's `model` may say: which model, at which level, or both.

A level in a name is for clients that can choose nothing but a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from colm_serve.errors import UnknownModel

_LEVEL = re.compile(r"(?:(.+):)?level-([0-9]{1,9})")


def read_model_name(asked: str, num_levels: Mapping[str, int]) -> tuple[str, int | None]:
    """The model that a name is of, and the level it asks for if any.

    Args:
        asked: `chat`, `chat:level-2` or, of the cluster's own model, `level-2` or nothing.
        num_levels: how many the models have, by their names, the cluster's own first.

    Raises:
        UnknownModel: there is no such model, or it has no such level; says which there are.

    >>> read_model_name("chat:level-2", {"base": 2, "chat": 4})
    ('chat', 2)
    >>> read_model_name("level-2", {"base": 2, "chat": 4})
    ('base', 2)
    """
    own = next(iter(num_levels))
    match = None if asked in num_levels else _LEVEL.fullmatch(asked)
    name, level = (asked, None) if match is None else (match[1], int(match[2]))
    name = name or own
    if name not in num_levels or (level is not None and not 1 <= level <= num_levels[name]):
        names = (f"{name} (:level-1 to :level-{last})" for name, last in num_levels.items())
        raise UnknownModel("model", asked, ", ".join(names))
    return name, level
