"""Write the README's table of figures from the JSON files under `results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reporting import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def table() -> str:
    """Every row that has a target, in Markdown, with the machine it was measured on."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        lines += [
            f"`{result['benchmark']}`, {result['date']}, {result['machine']}:",
            "",
            "| figure | median | min to max | target | |",
            "|---|---:|---:|---:|---|",
        ]
        lines += [_line(row) for row in result["rows"] if row["headline"]]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    target = "" if row["target"] is None else f"{row['target']:g}"
    value = f"{row['value']:.3g} {row['unit']}".strip()
    return f"| {row['name']} | {value} | {low:.3g} to {high:.3g} | {target} | {row['note']} |"


def updated(readme: str) -> str:
    """The README's text with its table made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
