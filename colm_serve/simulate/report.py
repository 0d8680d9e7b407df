"""A simulation's figures for people: a table, a JSON file, plots."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from colm_serve.files import write_atomically
from colm_serve.simulate.outcomes import PERCENTILES, Figures, Outcome

HAS_MATPLOTLIB = find_spec("matplotlib") is not None
NO_PLOTS = "no plots: matplotlib is not installed, see the extra 'plots'"


def outcome_table(outcome: Outcome) -> Table:
    """A column for all requests and, where there are several, one for each class."""
    figures = {"all": outcome.total}
    if len(outcome.by_class) > 1:
        figures |= outcome.by_class
    table = Table(title=f"{outcome.num_workers} workers, {outcome.duration_s:.1f} s")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    columns = [_column(each) for each in figures.values()]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    tokens = sum(outcome.tokens_by_level)
    table.add_section()
    for index, num_tokens in enumerate(outcome.tokens_by_level):
        share = num_tokens / tokens if tokens else 0.0
        table.add_row(f"tokens at level {index + 1}", f"{num_tokens} ({share:.0%})")
    cost = outcome.worker_s_per_1000_tokens
    table.add_row("worker-seconds per 1,000 tokens", "" if cost is None else f"{cost:.3g}")
    table.add_row("preemptions", str(outcome.num_preemptions))
    table.add_row("level moves", str(outcome.num_level_moves))
    return table


def _column(figures: Figures) -> dict[str, str]:
    cells = {
        "requests": str(figures.num_requests),
        "refused": str(figures.num_refused),
        "past their deadline": str(figures.num_late),
    }
    for name, values in (("TTFT", figures.ttft_ms), ("TPOT", figures.tpot_ms)):
        for index, percentile in enumerate(PERCENTILES):
            shown = "" if values is None else f"{values[index]:.1f} ms"
            cells[f"{name} p{percentile}"] = shown
    cells["within their SLA"] = f"{figures.attainment:.1%}"
    cells["goodput"] = f"{figures.goodput_per_s:.2f} requests/s"
    cells["mean level"] = "" if figures.mean_level is None else f"{figures.mean_level:.2f}"
    return cells


def write_outcome(outcome: Outcome, folder: Path) -> list[Path]:
    """Write `outcome.json` and, where matplotlib is installed, the plots; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "outcome.json"
    write_atomically(path, json.dumps(outcome.as_json(), indent=2) + "\n")
    if not HAS_MATPLOTLIB:
        return [path]
    # It takes longer to import than most commands run.
    from colm_serve.simulate.plots import save_plots

    return [path, *save_plots(outcome, folder)]
