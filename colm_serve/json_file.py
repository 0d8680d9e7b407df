"""The JSON files of a model folder: what is wrong in them is said with file and key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from colm_serve.errors import CheckpointError

T = TypeVar("T")


class JsonObject:
    """An object in a JSON file; its `values` are checked as they are read, and null is none."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of the given type; an integer is a float too.

        Raises:
            CheckpointError: it has another type, or there is neither value nor default.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.unsupported(key, f"a value of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.unsupported(key, "a finite number")
        return value

    def get_any(self, key: str, default: Any = None) -> Any:
        """A value of any type; null where the file says so."""
        return self.values.get(key, default)

    def inner(self, key: str) -> JsonObject:
        """The object under a key; an empty one if there is none."""
        return JsonObject(self.path, self.get(key, dict, {}), f"{self._prefix}{key}.")

    def unsupported(self, key: str, supported: str) -> CheckpointError:
        """An error that says what is there, and what would be supported."""
        found = f"{self.values[key]!r:.120}" if key in self.values else "nothing"
        return CheckpointError(f"{self.path}: {self._prefix}{key}: {found}; supported: {supported}")


def read_json(path: Path) -> JsonObject:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: the file is not there, or holds something else.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object but {raw!r:.80}")
    return JsonObject(path, raw)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
