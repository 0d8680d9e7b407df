"""Plots of a simulation, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from colm_serve.simulate.outcomes import Outcome, joined_values

try:
    from matplotlib.figure import Figure
except ImportError:
    HAS_MATPLOTLIB = False
else:
    HAS_MATPLOTLIB = True


def save_plots(outcome: Outcome, folder: Path) -> list[Path]:
    """Write the distributions of TTFT and TPOT, and the tokens of each level."""
    latencies = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(latencies.subplots(1, 2), ("ttft_ms", "tpot_ms"), strict=True):
        for sla_name, outcomes in outcome.classes.items():
            values = np.sort(joined_values([getattr(outcomes, name)]))
            if len(values):
                axes.plot(values, np.arange(1, len(values) + 1) / len(values), label=sla_name)
        axes.set(xlabel=f"{name[:4].upper()}, ms", ylabel="share of requests", xscale="log")
        axes.legend()
    levels = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = levels.subplots()
    names = [str(level + 1) for level in range(len(outcome.tokens_by_level))]
    axes.bar(names, outcome.tokens_by_level)
    axes.set(xlabel="level", ylabel="tokens")
    paths = [folder / "latencies.svg", folder / "levels.svg"]
    for figure, path in zip((latencies, levels), paths, strict=True):
        figure.savefig(path)
    return paths
