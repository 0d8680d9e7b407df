"""The simulator: how fast it is at 1,000 workers, and how near to a real run.

Speed: a bursty trace of conversations with shared prefixes against 1,000 workers, in a process that
does nothing else, on one core.

Nearness: one prefill and one decode worker, each a process with one thread, serve a Poisson trace
with the bundled model; the same trace is then simulated. Its costs are those that the workers tell,
calibrated on another trace of the same kind.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from real_cluster import replay, running
from reporting import Row, save, show
from rich.console import Console

from colm_serve.config import ClusterConfig
from colm_serve.measured_costs import measure_costs
from colm_serve.simulate.costs import PassCosts, StepCosts, WorkerCosts
from colm_serve.simulate.outcomes import Figures
from colm_serve.simulate.simulation import Simulation
from colm_serve.simulate.synthetic import SyntheticTrace
from colm_serve.simulate.trace import Trace

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"
PREFILL_SHARE = 0.3
#: Of what the decode workers make at the top level with 16 rows each.
UTILIZATION = 0.3
VALIDATION_RATE = 4.0


def small_config() -> ClusterConfig:
    """What is run for real; simulated workers draft no tokens, so that these do not either."""
    return ClusterConfig.model_validate(
        {
            "model": MODEL,
            "prefill": {"count": 1},
            "decode": {"count": 1, "kv_tokens": 32768, "speculation": {"enabled": False}},
        }
    )


def large_config(num_workers: int) -> ClusterConfig:
    num_prefill = round(num_workers * PREFILL_SHARE)
    return ClusterConfig.model_validate(
        {
            "model": MODEL,
            "prefill": {"count": num_prefill, "page_size": 64},
            "decode": {
                "count": num_workers - num_prefill,
                "kv_tokens": 32768,
                "page_size": 64,
            },
            "router": {"max_concurrent": 32 * num_workers},
            "sla_classes": {
                "default": {},
                "interactive": {"ttft_ms": 500, "tpot_ms": 20},
            },
        }
    )


def large_trace(num_requests: int, costs: WorkerCosts, num_decode: int) -> SyntheticTrace:
    top = [16] * costs.num_levels
    tokens_per_s = num_decode * 16 / costs.step.step_cost.step_s(top, [16 * 400] * costs.num_levels)
    mean_output = 64
    return SyntheticTrace.model_validate(
        {
            "num_requests": num_requests,
            "arrivals": {"kind": "bursty", "rate_per_s": UTILIZATION * tokens_per_s / mean_output},
            "kinds": [
                {"weight": 3, "sla_class": "interactive", "output": {"mean": 32, "max": 256}},
                {"weight": 1, "output": {"mean": 160, "max": 512}},
            ],
            "conversations": {"mean_turns": 2, "num_shared_prefixes": 100},
        }
    )


def simulate_alone(
    num_workers: int, num_requests: int, costs: WorkerCosts
) -> tuple[float, float, Figures]:
    """Seconds, peak memory in GiB, and what became of the requests."""
    config = large_config(num_workers)
    trace = large_trace(num_requests, costs, config.decode.count)
    begin = time.perf_counter()
    outcome = Simulation(config, costs).run(trace)
    seconds = time.perf_counter() - begin
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak_kib / 2**20, outcome.total


def measure_speed(num_workers: int, num_requests: int, costs: WorkerCosts) -> list[Row]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        future = pool.submit(simulate_alone, num_workers, num_requests, costs)
        seconds, peak_gib, figures = future.result()
    name = f"{num_workers} workers, {num_requests} requests"
    note = (
        f"{figures.attainment:.0%} within their SLA at mean level {figures.mean_level or 0:.2f}, "
        f"{figures.num_refused} refused"
    )
    return [
        Row.of(f"{name}: time", [seconds], "s", "lower", target=300, note=note, headline=True),
        Row.of(f"{name}: peak memory", [peak_gib], "GiB", "lower", target=4, headline=True),
        Row.of(f"{name}: time of a request", [seconds / num_requests * 1e6], "us", "lower"),
    ]


def validation_trace(num_requests: int, rate_per_s: float, seed: int) -> SyntheticTrace:
    return SyntheticTrace.model_validate(
        {
            "num_requests": num_requests,
            "seed": seed,
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "kinds": [{"prompt": {"mean": 256, "max": 1024}, "output": {"mean": 48, "max": 128}}],
        }
    )


def calibrated(
    costs: WorkerCosts, config: ClusterConfig, trace: Trace, real: Figures
) -> WorkerCosts:
    """The costs with a step's and those before it scaled until a trace takes what it took for real.

    Workers tell what they compute; what their processes, the router's and the client's take from
    each other on the same cores is in no worker's figures.
    """
    real_ttft, real_tpot = _medians(real)
    for _ in range(4):
        ttft, tpot = _medians(Simulation(config, costs).run(trace).total)
        per_step = real_tpot / tpot
        before = max(0.1, (real_ttft - real_tpot) / (ttft - tpot))
        costs = WorkerCosts(
            step=StepCosts(**{k: tuple(per_step * s for s in v) for k, v in costs.step}),
            prefill=PassCosts(**{k: before * s for k, s in costs.prefill}),
            transfer_token_s=before * costs.transfer_token_s,
            hop_s=before * costs.hop_s,
        )
    return costs


def _medians(figures: Figures) -> tuple[float, float]:
    """TTFT and TPOT, in milliseconds."""
    if figures.ttft_ms is None or figures.tpot_ms is None:
        raise RuntimeError("no request of the trace has finished")
    return figures.ttft_ms[0], figures.tpot_ms[0]


def measure_nearness(
    num_requests: int, rate_per_s: float, repeats: int
) -> tuple[list[Row], WorkerCosts]:
    """Rows of predicted over measured medians, and the costs they are predicted from."""
    config = small_config()
    pairs: list[tuple[Figures, Figures]] = []
    with running(config) as cluster:
        replay(cluster, validation_trace(num_requests // 4, rate_per_s, seed=1001))
        known = validation_trace(num_requests, rate_per_s, seed=1000)
        real = replay(cluster, known).total
        costs = calibrated(measure_costs(cluster.address), config, known, real)
        for seed in range(repeats):
            trace = validation_trace(num_requests, rate_per_s, seed)
            real = replay(cluster, trace).total
            pairs.append((Simulation(config, costs).run(trace).total, real))
    rows = []
    for name in ("ttft_ms", "tpot_ms"):
        predicted = [getattr(simulated, name)[0] for simulated, _ in pairs]
        measured = [getattr(real, name)[0] for _, real in pairs]
        errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
        label = f"{rate_per_s:g} requests/s: p50 {name[:4].upper()}"
        rows += [
            Row.of(f"{label}, measured", measured, "ms", "lower"),
            Row.of(f"{label}, simulated", predicted, "ms", "lower"),
            Row.of(
                f"{label}: simulated off measured",
                [abs(error) for error in errors],
                "",
                "lower",
                target=0.2,
                headline=True,
                note=f"simulated over measured: {min(errors):+.0%} to {max(errors):+.0%}",
            ),
        ]
    return rows, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=VALIDATION_RATE, help="of the real run")
    parser.add_argument("--real-requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments: Any = parser.parse_args()
    with Console().status("simulating and serving"):
        rows, costs = measure_nearness(arguments.real_requests, arguments.rate, arguments.repeats)
        rows += measure_speed(arguments.workers, arguments.requests, costs)
    show("simulator", rows)
    print(f"written to {save('simulator', rows)}")


if __name__ == "__main__":
    main()
