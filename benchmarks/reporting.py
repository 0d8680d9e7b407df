"""What every benchmark writes: one JSON of rows under `results/`, one table on the terminal."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "grpcio", "ray")


@dataclass(frozen=True)
class Row:
    """One figure: a median, with the least and the greatest measured.

    A `headline` stands in the README's table.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    spread: tuple[float, float]
    target: float | None = None
    note: str = ""
    headline: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        better: Literal["higher", "lower"],
        *,
        target: float | None = None,
        note: str = "",
        headline: bool = False,
    ) -> Row:
        """The row of repeated measurements."""
        spread = (min(values), max(values))
        return cls(name, median(values), unit, better, spread, target, note, headline)

    @property
    def meets_target(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def save(benchmark: str, rows: Sequence[Row]) -> Path:
    """Write `results/<benchmark>.json`."""
    content = {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
        "versions": {name: version(name) for name in _PACKAGES},
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows; a missed target is marked."""
    table = Table(title=title)
    for column in ("", "median", "min", "max", "unit", "target"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}"
        table.add_row(
            row.name,
            f"{row.value:.3g}",
            f"{row.spread[0]:.3g}",
            f"{row.spread[1]:.3g}",
            row.unit,
            target if row.meets_target else f"[red]{target} missed[/red]",
        )
    Console().print(table)


def _commit() -> str:
    root = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        model = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), "")
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, no GPU in use"
