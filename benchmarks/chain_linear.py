"""Table 16: one Chain-of-Linear layer against a dense one, forward and backward, on this CPU.

Ours computes columns of one tensor, forward and backward; beside it stands Algorithm 1 as the paper
writes it, whose parts are concatenated and whose gradients are autograd's. All take turns in one
run, so that what else the machine does hits all alike. Besides times there are the shares of
dense's operations, which the time could come down to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reporting import Row, save, show
from rich.console import Console
from torch import Tensor, nn

from colm_serve.model.layers import ChainLinear

#: The paper's settings and, in ms on an A100, its forward, weight and input gradients.
SETTINGS = {
    "{8,8,8,8}, 4096 wide": (
        [1024] * 4,
        {"dense": (0.67, 0.62, 0.64), "chains": (0.47, 0.46, 0.56)},
    ),
    "{4,...,4}, 8192 wide": (
        [1024] * 8,
        {"dense": (1.56, 1.61, 1.56), "chains": (0.77, 0.76, 0.90)},
    ),
}
PARTS = ("forward", "weight gradient", "input gradient")


@dataclass(frozen=True)
class Layer:
    """What is timed: a layer and its weights."""

    apply: Callable[[Tensor], Tensor]
    weights: list[nn.Parameter]

    def seconds(self, part: str, x_TD: Tensor) -> float:
        """Of a forward pass without gradients, or of one gradient without the other."""
        x_TD = x_TD.detach().requires_grad_(part == "input gradient")
        for weight in self.weights:
            weight.requires_grad_(part == "weight gradient")
        started = time.perf_counter()
        y_TO = self.apply(x_TD)
        if part == "forward":
            return time.perf_counter() - started
        gradient_TO = torch.randn_like(y_TO)
        of = self.weights if part == "weight gradient" else [x_TD]
        started = time.perf_counter()
        torch.autograd.grad(y_TO, of, gradient_TO)
        return time.perf_counter() - started


def measure(widths: list[int], num_rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by implementation and part; the implementations take turns."""
    x_TD = torch.randn(num_rows, sum(widths))
    dense, chains = nn.Linear(sum(widths), sum(widths), bias=False), ChainLinear(widths, widths)
    rows = [num_rows] * len(widths)

    def algorithm_1(x_TD: Tensor) -> Tensor:
        parts = [x_TD[:, : weight.shape[1]] @ weight.T for weight in chains.weights]
        return torch.cat(parts, dim=-1)

    layers = {
        "dense": Layer(dense, list(dense.parameters())),
        "Algorithm 1": Layer(algorithm_1, list(chains.weights)),
        "chains": Layer(lambda x: chains(x, rows), list(chains.weights)),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PARTS} for name in layers}
    for i in range(repeats + 1):
        for part in PARTS:
            for name, layer in layers.items():
                elapsed_s = layer.seconds(part, x_TD)
                if i:
                    seconds[name][part].append(elapsed_s)
    return seconds


def rows_of(setting: str, num_rows: int, repeats: int) -> list[Row]:
    """Each part's time over the dense layer's, and what the operations would give."""
    widths, paper = SETTINGS[setting]
    seconds = measure(widths, num_rows, repeats)
    n = len(widths)
    share = Row.of(
        f"{setting}: weights and operations over dense's", [(n + 1) / (2 * n)], "x", "lower"
    )
    rows = [share]
    for place, part in enumerate(PARTS):
        for name in ("Algorithm 1", "chains"):
            ratios = [
                a / b for a, b in zip(seconds[name][part], seconds["dense"][part], strict=True)
            ]
            theirs = paper["chains"][place] / paper["dense"][place]
            note = f"the paper's kernel: {theirs:.2f}x" if name == "chains" else ""
            case = f"{setting}: {part}, {name} over dense"
            rows.append(Row.of(case, ratios, "x", "lower", note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="tokens in a batch")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with Console().status("timing"):
        for setting in SETTINGS:
            rows += rows_of(setting, arguments.rows, arguments.repeats)
    show("Chain-of-Linear against Linear", rows)
    print(f"written to {save('chain_linear', rows)}")


if __name__ == "__main__":
    main()
