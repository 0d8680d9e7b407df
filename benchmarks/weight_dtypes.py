"""Smaller weights on a CPU: what they gain in speed, and what they cost at each level.

Speed is a step's at width 2048 with random weights; cost is the bundled model's loss on held-out
text, each window scored by the same pass that serves.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from decode import CHAINED, Stepper, measure
from heldout import MODEL, heldout_windows
from reporting import Row, save, show
from rich.console import Console

from colm_serve.engine.loading import make_pool
from colm_serve.engine.step import Segment, run_pass
from colm_serve.model.checkpoint import load_cpu_model
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.transformer import ColmModel

DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
WINDOW = 512
PAGE_SIZE = 16


def speed(repeats: int) -> list[Row]:
    """Steps of one row at each level, in turns with fp32's."""
    model = ColmModel(CHAINED).requires_grad_(False)
    exact = Stepper(CHAINED, CpuModel.pack(model))
    rows = []
    for name, dtype in DTYPES.items():
        small = Stepper(CHAINED, CpuModel.pack(model, dtype))
        for level in range(1, CHAINED.num_chains + 1):
            ratios = []
            for _ in range(repeats):
                exact_s = min(measure(partial(exact.step, [level]), 3))
                ratios.append(exact_s / min(measure(partial(small.step, [level]), 3)))
            case = f"{name} weights, level {level}, 1 row: tokens/s over float32's"
            rows.append(Row.of(case, ratios, "x", "higher", headline=level == CHAINED.num_chains))
    return rows


def cost(num_windows: int) -> list[Row]:
    """Held-out loss of each level above that of the same level in fp32, window by window."""
    windows = heldout_windows(num_windows, WINDOW)
    num_levels = load_cpu_model(MODEL).model.num_chains
    rows = []
    for level in range(1, num_levels + 1):
        exact = losses(torch.float32, level, windows)
        for name, dtype in DTYPES.items():
            small = losses(dtype, level, windows)
            mean = sum(small) / len(small) - sum(exact) / len(exact)
            spread = [a - b for a, b in zip(small, exact, strict=True)]
            case = f"{name} weights, level {level}: loss above {sum(exact) / len(exact):.3f}"
            row = Row.of(case, [mean], "nats", "lower", headline=level in (1, num_levels))
            rows.append(replace(row, spread=(min(spread), max(spread))))
    return rows


def losses(dtype: torch.dtype, level: int, windows: list[list[int]]) -> list[float]:
    """Mean nats a token of each window."""
    loaded = load_cpu_model(MODEL, weight_dtype=dtype)
    pool = make_pool(loaded, WINDOW // PAGE_SIZE, PAGE_SIZE)
    table = pool.table(range(WINDOW // PAGE_SIZE))
    results = []
    for window in windows:
        segment = Segment(window[:-1], 0, level, table, num_scored=WINDOW)
        scores = run_pass(loaded.model, pool, [segment])
        results.append(F.cross_entropy(scores.logits_SV, torch.tensor(window[1:])).item())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with Console().status("timing steps and scoring held-out text"):
        rows = speed(arguments.repeats) + cost(arguments.windows)
    show("Weights of fewer bits on a CPU", rows)
    print(f"written to {save('weight_dtypes', rows)}")


if __name__ == "__main__":
    main()
