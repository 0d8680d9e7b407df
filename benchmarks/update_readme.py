"""Write the figures of README.md and docs/paper-reproduction.md from the JSON files of `results/`.

The README has every headline; the other page has, where it says `<!-- results: NAME -->`, every
row of that benchmark.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from reporting import RESULTS

README = Path(__file__).parent.parent / "README.md"
REPRODUCTION = README.parent / "docs" / "paper-reproduction.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def table() -> str:
    """Every headline in Markdown, with the machine it was measured on."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        # The costs that a simulation was made with have no rows.
        headlines = [row for row in result.get("rows", ()) if row["headline"]]
        if not headlines:
            continue
        lines += [
            f"`{result['benchmark']}`, {result['date']}, {result['machine']}:",
            "",
            "| figure | median | min to max | target | |",
            "|---|---:|---:|---:|---|",
        ]
        lines += [_line(row) for row in headlines]
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


def reproduced(page: str) -> str:
    """The text of the page on the paper with each benchmark's rows made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_all_rows(block[2])}{block[3]}", page)


def _all_rows(benchmark: str) -> str:
    path = RESULTS / f"{benchmark}.json"
    if not path.exists():
        return f"Not measured yet: `python benchmarks/{benchmark}.py`.\n"
    result = json.loads(path.read_text("utf-8"))
    lines = [
        f"`{result['command']}`, {result['date']}, {result['machine']}:",
        "",
        "| figure | median | min to max | |",
        "|---|---:|---:|---|",
    ]
    for row in result["rows"]:
        low, high = row["spread"]
        spread = "" if low == high else f"{low:.4g} to {high:.4g}"
        value = f"{row['value']:.4g} {row['unit']}".strip()
        lines.append(f"| {row['name']} | {value} | {spread} | {row['note']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
    REPRODUCTION.write_text(reproduced(REPRODUCTION.read_text("utf-8")), "utf-8")
