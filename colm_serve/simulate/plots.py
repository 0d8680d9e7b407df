"""Plots of a simulation. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from colm_serve.simulate.outcomes import Outcome, joined_values


def save_plots(outcome: Outcome, folder: Path) -> list[Path]:
    """Write the distributions of TTFT and TPOT, and the tokens of each level."""
    latencies = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = latencies.subplots(1, 2, sharey=True)
    _plot_times(left, outcome, "ttft_ms")
    _plot_times(right, outcome, "tpot_ms")
    left.set(xlabel="time to first token (ms)", ylabel="share of finished requests")
    label_ticks(left, "125")
    right.set(xlabel="time per output token (ms)")
    latencies.legend(*left.get_legend_handles_labels(), loc="outside right center")
    levels = Figure(figsize=(4.5, 3.5), layout="constrained")
    _plot_levels(levels.subplots(), outcome)
    paths = [folder / "latencies.svg", folder / "levels.svg"]
    for figure, path in zip((latencies, levels), paths, strict=True):
        save_svg(figure, path)
    return paths


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure: equal ones give equal files, whose letters are text."""
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def label_ticks(axes: Axes, first_digits: str) -> None:
    """Make the x axis logarithmic, with plain numbers at the ticks that begin with these digits."""
    axes.set_xscale("log")
    formatter = FuncFormatter(
        lambda value, _: f"{value:g}" if f"{value:e}"[0] in first_digits else ""
    )
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_minor_formatter(formatter)


def show_shares(axes: Axes) -> None:
    """Make the y axis one of shares, in percent."""
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _plot_times(axes: Axes, outcome: Outcome, name: str) -> None:
    """Cumulative shares by class; a dotted line is the class's target."""
    for sla_name, outcomes in outcome.classes.items():
        values = joined_values([getattr(outcomes, name)])
        if not len(values):
            continue
        # So many points show as much as a million, in a small file.
        shares = np.linspace(0, 1, 101)
        (line,) = axes.plot(np.quantile(values, shares), shares, label=sla_name)
        target_ms = getattr(outcomes.sla, name)
        if target_ms is not None:
            label = f"{sla_name}: target"
            axes.axvline(target_ms, color=line.get_color(), linestyle=":", label=label)
    show_shares(axes)
    axes.grid(alpha=0.3)


def _plot_levels(axes: Axes, outcome: Outcome) -> None:
    total = max(1, sum(outcome.tokens_by_level))
    shares = {str(i + 1): num / total for i, num in enumerate(outcome.tokens_by_level)}
    bars = axes.bar(list(shares), list(shares.values()))
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()])
    axes.set(xlabel="chain level", ylabel="share of tokens")
    show_shares(axes)
