"""Goodput: the highest rate at which 90% of a bursty mixed load keep their SLA, by policy.

Every policy gets the same workers, the same classes and the same trace, played faster and faster.
Simulated with 64 workers, and for real with the bundled model on one prefill and one decode worker,
whose measured costs are those of the simulation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from real_cluster import RealCluster, replay, running
from reporting import RESULTS, Row, save, show
from rich.console import Console

from colm_serve.config import ClusterConfig
from colm_serve.measured_costs import measure_costs
from colm_serve.model.config import ColmConfig
from colm_serve.simulate.command import with_policy
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.outcomes import Figures
from colm_serve.simulate.plots import HAS_MATPLOTLIB, NO_PLOTS, label_ticks, save_svg, show_shares
from colm_serve.simulate.simulation import Simulation
from colm_serve.simulate.synthetic import SyntheticTrace

if HAS_MATPLOTLIB:
    from matplotlib.figure import Figure

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"
ATTAINMENT = 0.9
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Point:
    """What became of the trace at one rate."""

    rate_per_s: float
    figures: Figures

    @property
    def is_kept(self) -> bool:
        return self.figures.attainment >= ATTAINMENT


@dataclass(frozen=True)
class Goodput:
    """Every rate that was tried with one policy."""

    points: tuple[Point, ...]

    @property
    def best(self) -> Point | None:
        """The highest rate below which none was missed."""
        lowest_missed = min((p.rate_per_s for p in self.points if not p.is_kept), default=math.inf)
        kept = [p for p in self.points if p.is_kept and p.rate_per_s < lowest_missed]
        return max(kept, key=lambda point: point.rate_per_s, default=None)

    @property
    def rate_per_s(self) -> float:
        return 0.0 if self.best is None else self.best.rate_per_s

    @property
    def mean_level(self) -> float:
        return 0.0 if self.best is None else self.best.figures.mean_level or 0.0


def find_goodput(play: Callable[[float], Figures], first: float, num_halvings: int) -> Goodput:
    """Double or halve the rate from `first` until one is kept and one missed, then bisect."""
    points: list[Point] = []

    def is_kept(rate: float) -> bool:
        points.append(Point(rate, play(rate)))
        return points[-1].is_kept

    low = high = first
    if is_kept(first):
        while is_kept(high := high * 2):
            low = high
    else:
        while not is_kept(low := low / 2) and low > first / 64:
            high = low
    for _ in range(num_halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_kept(middle) else (low, middle)
    return Goodput(tuple(points))


def config_of(num_prefill: int, num_decode: int) -> ClusterConfig:
    """Chats that want quick tokens, and texts that may take longer but want a larger model."""
    return ClusterConfig.model_validate(
        {
            "model": MODEL,
            "prefill": {"count": num_prefill},
            "decode": {"count": num_decode, "kv_tokens": 32768, "speculation": {"enabled": False}},
            "router": {"max_concurrent": 256 * num_decode},
            "default_sla_class": "chat",
            "sla_classes": {
                "chat": {"ttft_ms": 500, "tpot_ms": 15, "weight": 2, "deadline_s": 60},
                "text": {"ttft_ms": 2000, "tpot_ms": 40, "min_level": 2, "deadline_s": 120},
            },
        }
    )


def trace_of(rate_per_s: float, duration_s: float, seed: int) -> SyntheticTrace:
    """The same bursts at any rate."""
    return SyntheticTrace.model_validate(
        {
            "num_requests": max(10, round(rate_per_s * duration_s)),
            "seed": seed,
            "arrivals": {
                "kind": "bursty",
                "rate_per_s": rate_per_s,
                "burst_ratio": 6,
                "burst_s": 4,
                "calm_s": 12,
            },
            "kinds": [
                {
                    "weight": 3,
                    "sla_class": "chat",
                    "prompt": {"mean": 120, "max": 512},
                    "output": {"mean": 40, "max": 160},
                },
                {
                    "weight": 1,
                    "sla_class": "text",
                    "prompt": {"mean": 400, "max": 1024},
                    "output": {"mean": 120, "max": 400},
                },
            ],
            "conversations": {"num_shared_prefixes": 8, "shared_prefix_tokens": 64},
        }
    )


def policy_names(num_levels: int) -> list[str]:
    """The one to be shown, and every fixed level, the top one last."""
    return [ADAPTIVE, *(f"level-{level}" for level in range(1, num_levels + 1))]


def simulated(costs: WorkerCosts, num_workers: int, duration_s: float) -> dict[str, Goodput]:
    """By policy; a quarter of the workers are prefill workers."""
    config = config_of(num_workers // 4, num_workers - num_workers // 4)

    def play(policy: str, rate_per_s: float) -> Figures:
        trace = trace_of(rate_per_s, duration_s, seed=0)
        return Simulation(with_policy(config, policy), costs).run(trace).total

    first = 8.0 * num_workers
    names = policy_names(costs.num_levels)
    return {name: find_goodput(partial(play, name), first, num_halvings=4) for name in names}


def real(duration_s: float, first: float) -> tuple[dict[str, Goodput], WorkerCosts]:
    """By policy, and what the workers said that their work costs."""
    config = config_of(1, 1)
    found = {}
    for name in policy_names(ColmConfig.load(MODEL).num_chains):
        with running(with_policy(config, name)) as cluster:
            replay(cluster, trace_of(first, 10.0, seed=1))  # warms up, and fits the costs

            def play(rate_per_s: float, cluster: RealCluster = cluster) -> Figures:
                return replay(cluster, trace_of(rate_per_s, duration_s, seed=0)).total

            found[name] = find_goodput(play, first, num_halvings=3)
            if name == ADAPTIVE:
                costs = measure_costs(cluster.address)
    return found, costs


def rows_of(where: str, found: dict[str, Goodput], over_top: float, over_best: float) -> list[Row]:
    adaptive = found[ADAPTIVE]
    fixed = {name: goodput for name, goodput in found.items() if name != ADAPTIVE}
    best = max(fixed, key=lambda name: fixed[name].rate_per_s)
    top = list(fixed)[-1]
    rows = [
        Row.of(
            f"{where}, {name}: goodput", [goodput.rate_per_s], "requests/s", "higher",
            note=f"mean level {goodput.mean_level:.2f}",
        )
        for name, goodput in found.items()
    ]  # fmt: skip
    for name, target in ((top, over_top), (best, over_best)):
        ratio = adaptive.rate_per_s / (fixed[name].rate_per_s or math.inf)
        what = "the top level alone" if target is over_top else "the best fixed level"
        note = f"{name}; mean level {adaptive.mean_level:.2f}, {fixed[name].mean_level:.2f} there"
        rows.append(
            Row.of(
                f"{where}: adaptive goodput over {what}'s", [ratio], "x", "higher",
                target=target, note=note, headline=True,
            )
        )  # fmt: skip
    return rows


def save_plot(where: str, found: dict[str, Goodput]) -> Path:
    """Requests within their SLA and mean level by rate, one line a policy."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    figure.suptitle(f"{where[0].upper()}{where[1:]}")
    left, right = figure.subplots(1, 2)
    for name, goodput in found.items():
        points = sorted(goodput.points, key=lambda point: point.rate_per_s)
        rates = [point.rate_per_s for point in points]
        width = 2.5 if name == ADAPTIVE else 1.2
        kept = [point.figures.attainment for point in points]
        left.plot(rates, kept, marker=".", label=name, linewidth=width)
        levels = [math.nan if (p := point.figures.mean_level) is None else p for point in points]
        right.plot(rates, levels, marker=".", linewidth=width)
    left.axhline(ATTAINMENT, color="gray", linestyle=":", label=f"{ATTAINMENT:.0%}")
    left.set_ylabel("requests within their SLA")
    show_shares(left)
    right.set_ylabel("mean level of a token")
    for axes in (left, right):
        axes.set_xlabel("requests/s")
        label_ticks(axes, "125")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    path = RESULTS / f"goodput_{where.replace(' ', '_')}.svg"
    save_svg(figure, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64, help="simulated")
    parser.add_argument("--duration", type=float, default=40.0, help="of a trace, simulated")
    parser.add_argument("--real-duration", type=float, default=45.0)
    parser.add_argument("--real-rate", type=float, default=4.0, help="to begin with")
    arguments: Any = parser.parse_args()
    with Console().status("serving and simulating"):
        served, costs = real(arguments.real_duration, arguments.real_rate)
        played = simulated(costs, arguments.workers, arguments.duration)
    name = f"{arguments.workers} workers simulated"
    rows = [
        *rows_of(name, played, over_top=2.0, over_best=1.2),
        *rows_of("for real", served, over_top=1.5, over_best=1.0),
    ]
    show("goodput: requests/s with 90% inside their SLA", rows)
    if HAS_MATPLOTLIB:
        for where, found in ((name, played), ("for real", served)):
            print(f"written to {save_plot(where, found)}")
    else:
        print(NO_PLOTS)
    print(f"written to {save('goodput', rows)}")


if __name__ == "__main__":
    main()
