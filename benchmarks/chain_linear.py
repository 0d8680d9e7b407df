"""Table 16: one Chain-of-Linear layer against a dense one, forward and backward, on this CPU.

Forward is timed as served (slices of one output) and as Algorithm 1 has it (parts concatenated),
which is also how training computes it; the gradients are Algorithm 1's by autograd. All take turns
in one run, so that what else the machine does hits all alike. Besides times there are the shares of
dense's operations, which the time could come down to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

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


class Timed:
    """The three computations of a layer."""

    def __init__(
        self, weights: list[Tensor], apply: Callable[[Tensor], Tensor], x_TD: Tensor
    ) -> None:
        self._weights, self._apply = weights, apply
        self._x_TD = x_TD.requires_grad_()
        self._y_TO = apply(self._x_TD)
        self._gradient_TO = torch.randn_like(self._y_TO)

    def run(self, part: str) -> None:
        if part == "forward":
            with torch.no_grad():
                self._apply(self._x_TD)
            return
        of = self._weights if part == "weight gradient" else [self._x_TD]
        torch.autograd.grad(self._y_TO, of, self._gradient_TO, retain_graph=True)


def measure(widths: list[int], num_rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by implementation and part; the implementations take turns."""
    x_TD = torch.randn(num_rows, sum(widths))
    dense, chains = nn.Linear(sum(widths), sum(widths), bias=False), ChainLinear(widths, widths)
    rows = [num_rows] * len(widths)

    def algorithm_1(x_TD: Tensor) -> Tensor:
        parts = [x_TD[:, : weight.shape[1]] @ weight.T for weight in chains.weights]
        return torch.cat(parts, dim=-1)

    layers = {
        "dense": Timed(list(dense.parameters()), dense, x_TD),
        "Algorithm 1": Timed(list(chains.weights), algorithm_1, x_TD),
        "chains": Timed(list(chains.weights), lambda x: chains(x, rows), x_TD),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PARTS} for name in layers}
    for i in range(repeats + 1):
        for part in PARTS:
            for name, layer in layers.items():
                started = time.perf_counter()
                layer.run(part)
                if i:
                    seconds[name][part].append(time.perf_counter() - started)
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
