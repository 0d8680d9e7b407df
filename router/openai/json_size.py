"""How much JSON there is in a value. Pure."""

from __future__ import annotations

from typing import Any

from colm_serve.config import LimitsConfig
from colm_serve.errors import InvalidArgument


def check_json(field: str, value: Any, limits: LimitsConfig) -> None:
    """Raise InvalidArgument for too many keys, or lists and objects too deep in one another."""
    num_keys, depth, level = 0, 0, [value]
    while level:
        inner = [part for part in level if isinstance(part, dict | list)]
        num_keys += sum(len(part) for part in inner if isinstance(part, dict))
        depth += bool(inner)
        if num_keys > limits.max_json_keys:
            shown = f"over {limits.max_json_keys} keys"
            raise InvalidArgument(field, shown, f"at most {limits.max_json_keys}")
        if depth > limits.max_json_depth:
            allowed = f"at most {limits.max_json_depth} lists and objects in one another"
            raise InvalidArgument(field, f"over {limits.max_json_depth}", allowed)
        level = [
            below for part in inner for below in (part.values() if isinstance(part, dict) else part)
        ]
