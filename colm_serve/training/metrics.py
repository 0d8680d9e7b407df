"""A run's `metrics.jsonl`: one JSON object a line, in the order of the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colm_serve.files import write_atomically


class MetricsLog:
    """Appends lines; those of steps that a resumed run will do again are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Mapping[str, object]) -> None:
        """Add a line; `row` has a `step`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of the file; a run that was killed may have left half a line."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
