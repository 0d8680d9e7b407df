"""Goodput: the highest rate at which 90% of a bursty mixed load keep their SLA, by policy.

Every policy gets the same workers, the same classes and the same trace, played faster and faster;
who is refused has missed. A fixed level serves a class at its lowest level if that is higher.

Simulated with 64 workers, whose costs are measured here with a model of 0.4 billion parameters
(results/large_costs.json), and for real with the bundled model on one prefill and one decode
worker. Chats are as long as those of LMSYS-Chat-1M, about 70 tokens asked and 215 answered: with
long outputs decode workers are what there is too little of, and levels cost only these anything.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from goodput_search import ATTAINMENT, Goodput, find_goodput
from large_costs import measure_large_costs
from real_cluster import RealCluster, replay, running
from reporting import RESULTS, Row, save, show

from colm_serve.config import ClusterConfig
from colm_serve.model.config import ColmConfig
from colm_serve.simulate.command import with_policy
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.outcomes import Figures
from colm_serve.simulate.report import HAS_MATPLOTLIB, NO_PLOTS
from colm_serve.simulate.simulation import Simulation
from colm_serve.simulate.synthetic import SyntheticTrace

if HAS_MATPLOTLIB:
    from matplotlib.figure import Figure

    from colm_serve.simulate.plots import label_ticks, save_svg, show_shares

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"
ADAPTIVE = "adaptive"


#: Of chats, then of texts: to the first token, for each later one.
LARGE_TARGETS_MS = (1000, 100), (4000, 200)
SMALL_TARGETS_MS = (500, 15), (2000, 40)
Targets = tuple[tuple[float, float], tuple[float, float]]


def config_of(num_prefill: int, num_decode: int, targets_ms: Targets) -> ClusterConfig:
    """Chats that want quick tokens, and texts that may take longer but want a larger model."""
    chat, text = targets_ms
    return ClusterConfig.model_validate(
        {
            "model": MODEL,
            "prefill": {"count": num_prefill},
            "decode": {"count": num_decode, "kv_tokens": 32768, "speculation": {"enabled": False}},
            "router": {"max_concurrent": 256 * num_decode, "max_queued": 256 * num_decode},
            "default_sla_class": "chat",
            "sla_classes": {
                "chat": {"ttft_ms": chat[0], "tpot_ms": chat[1], "weight": 2},
                "text": {"ttft_ms": text[0], "tpot_ms": text[1], "min_level": 2},
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
                    "weight": 4,
                    "sla_class": "chat",
                    "prompt": {"mean": 70, "spread": 1, "max": 512},
                    "output": {"mean": 215, "spread": 0.8, "max": 1024},
                },
                {
                    "weight": 1,
                    "sla_class": "text",
                    "prompt": {"mean": 400, "max": 1024},
                    "output": {"mean": 400, "spread": 0.8, "max": 1024},
                },
            ],
            "conversations": {"num_shared_prefixes": 8, "shared_prefix_tokens": 64},
        }
    )


def simulated(
    costs: WorkerCosts, num_workers: int, duration_s: float, seed: int
) -> dict[str, Goodput]:
    """By policy, the top level last; a quarter of the workers are prefill workers."""
    config = config_of(num_workers // 4, num_workers - num_workers // 4, LARGE_TARGETS_MS)

    def play(policy: str, rate_per_s: float) -> Figures:
        trace = trace_of(rate_per_s, duration_s, seed)
        figures = Simulation(with_policy(config, policy), costs).run(trace).total
        say(f"simulated, seed {seed}, {policy}", rate_per_s, figures)
        return figures

    first = 0.8 * num_workers
    levels = [f"level-{level}" for level in range(1, costs.num_levels + 1)]
    return {
        name: find_goodput(partial(play, name), first, num_halvings=4)
        for name in (ADAPTIVE, *levels)
    }


def real(duration_s: float, first: float) -> dict[str, Goodput]:
    """By policy, the top level last; of fixed levels only the lowest and the top one."""
    config = config_of(1, 1, SMALL_TARGETS_MS)
    found = {}
    for name in (ADAPTIVE, "level-1", f"level-{ColmConfig.load(MODEL).num_chains}"):
        with running(with_policy(config, name)) as cluster:
            replay(cluster, trace_of(first, 10.0, seed=1))  # warms up, and fits the costs

            def play(
                rate_per_s: float, cluster: RealCluster = cluster, name: str = name
            ) -> Figures:
                figures = replay(cluster, trace_of(rate_per_s, duration_s, seed=0)).total
                say(f"for real, {name}", rate_per_s, figures)
                return figures

            found[name] = find_goodput(play, first, num_halvings=3)
    return found


def say(what: str, rate_per_s: float, figures: Figures) -> None:
    """Tell of a trace that has been played."""
    kept, refused = figures.attainment, figures.num_refused / figures.num_requests
    level = figures.mean_level or 0.0
    print(
        f"{what}: of {rate_per_s:.2f} requests/s {kept:.1%} within their SLA, "
        f"{refused:.1%} refused, mean level {level:.2f}",
        flush=True,
    )


def rows_of(
    where: str, runs: Sequence[dict[str, Goodput]], over_top: float, over_best: float
) -> list[Row]:
    """Of runs that differ in their trace's seed, each with the same policies."""
    fixed = [name for name in runs[0] if name != ADAPTIVE]
    best = max(fixed, key=lambda name: median(run[name].rate_per_s for run in runs))
    rows = [
        Row.of(
            f"{where}, {name}: goodput",
            [run[name].rate_per_s for run in runs],
            "requests/s",
            "higher",
            note=f"mean level {_level(runs, name):.2f}",
        )
        for name in runs[0]
    ]
    for what, name, target in (
        ("the top level alone", fixed[-1], over_top),
        ("the best fixed level", best, over_best),
    ):
        ratios = [run[ADAPTIVE].rate_per_s / (run[name].rate_per_s or math.inf) for run in runs]
        levels = f"mean level {_level(runs, ADAPTIVE):.2f}, {_level(runs, name):.2f} there"
        title = f"{where}: adaptive goodput over {what}'s"
        note = f"{name}; {levels}"
        rows.append(Row.of(title, ratios, "x", "higher", target=target, note=note, headline=True))
    return rows


def _level(runs: Sequence[dict[str, Goodput]], name: str) -> float:
    return median(run[name].mean_level for run in runs)


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
    parser.add_argument("--duration", type=float, default=90.0, help="of a trace, simulated")
    parser.add_argument("--seeds", type=int, default=3, help="of traces, simulated")
    parser.add_argument("--real-duration", type=float, default=20.0)
    parser.add_argument("--real-rate", type=float, default=8.0, help="to begin with")
    arguments: Any = parser.parse_args()
    served = real(arguments.real_duration, arguments.real_rate)
    costs = measure_large_costs()
    costs.save(RESULTS / "large_costs.json")
    played = [
        simulated(costs, arguments.workers, arguments.duration, seed)
        for seed in range(arguments.seeds)
    ]
    name = f"{arguments.workers} workers simulated"
    rows = [
        *rows_of(name, played, over_top=2.0, over_best=1.2),
        *rows_of("for real", [served], over_top=1.5, over_best=1.0),
    ]
    show("goodput: requests/s with 90% inside their SLA", rows)
    if HAS_MATPLOTLIB:
        for where, found in ((name, played[0]), ("for real", served)):
            print(f"written to {save_plot(where, found)}")
    else:
        print(NO_PLOTS)
    print(f"written to {save('goodput', rows)}")


if __name__ == "__main__":
    main()
