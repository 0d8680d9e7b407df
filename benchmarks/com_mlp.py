"""Table 14: a Chain-of-Model MLP against a dense one, on scikit-learn's digits.

The models are the paper's (A.2.2), layer for layer: an embedding of 768, three hidden layers, a
classifier over the last. The hidden layers are chain layers without bias, which gives the paper's
parameter counts to the digit. Digits are 1,797 images of 8 x 8 and easy, where the paper has
CIFAR-10: what chains cost shows here only where it is much.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from reporting import Row, save, show
from rich.console import Console
from torch import Tensor, nn

from colm_serve.model.layers import ChainLinear, ChainRMSNorm

EMBEDDING, HIDDEN = 768, (1024, 512, 256)
NUM_CLASSES = 10
SETTINGS: dict[str, tuple[int, ...]] = {
    "MLP (dense)": (),
    "CoM-MLP {4,4,4,4}": (4, 4, 4, 4),
    "CoM-MLP {8,8}": (8, 8),
    "CoM-MLP {4,12}": (4, 12),
    "CoM-MLP {4,4,8}": (4, 4, 8),
}
#: The paper's accuracies on CIFAR-10 in percent.
PAPER = {
    "MLP (dense)": "54.93 ± 0.23",
    "CoM-MLP {4,4,4,4}": "54.60 ± 0.16",
    "CoM-MLP {8,8}": "54.68 ± 0.04",
    "CoM-MLP {4,12}": "55.11 ± 0.21",
    "CoM-MLP {4,4,8}": "54.55 ± 0.36",
}
BATCH, LEARNING_RATE = 64, 1e-3


class ChainMlp(nn.Module):
    """Embedding, chain layers, classifier; with a norm of each chain before them if asked.

    Shapes: B images, D width.
    """

    def __init__(self, num_inputs: int, chains: Sequence[int], *, with_norm: bool = False) -> None:
        super().__init__()
        self.num_chains = len(chains)
        widths = [[width * c // sum(chains) for c in chains] for width in (EMBEDDING, *HIDDEN)]
        self.embedding = nn.Linear(num_inputs, EMBEDDING)
        self.layers = nn.ModuleList(ChainLinear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(ChainRMSNorm(w, 1e-5) for w in widths[:-1] if with_norm)
        self.classifier = nn.Linear(HIDDEN[-1], NUM_CLASSES)

    def forward(self, x_BD: Tensor) -> Tensor:
        num_rows = [len(x_BD)] * self.num_chains
        x_BD = F.relu(self.embedding(x_BD))
        for i, layer in enumerate(self.layers):
            x_BD = self.norms[i](x_BD, num_rows) if self.norms else x_BD
            x_BD = F.relu(layer(x_BD, num_rows))
        out: Tensor = self.classifier(x_BD)
        return out


def dense_mlp(num_inputs: int) -> nn.Module:
    """The baseline."""
    layers: list[nn.Module] = []
    for a, b in pairwise((num_inputs, EMBEDDING, *HIDDEN)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], NUM_CLASSES))


def make_model(num_inputs: int, chains: Sequence[int], *, with_norm: bool = False) -> nn.Module:
    """The baseline for no chains, else a CoM-MLP."""
    return ChainMlp(num_inputs, chains, with_norm=with_norm) if chains else dense_mlp(num_inputs)


@dataclass(frozen=True)
class Digits:
    """Images [B, 64] of values 0 to 1 and their classes [B]; a fifth is for the test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits  # the bench extra's; the models need it not

        bunch = load_digits()
        images = torch.from_numpy(bunch.data / 16).float()
        classes = torch.from_numpy(bunch.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, test = order[len(order) // 5 :], order[: len(order) // 5]
        return cls((images[train], classes[train]), (images[test], classes[test]))


def accuracy(
    digits: Digits, chains: Sequence[int], *, with_norm: bool, num_epochs: int, seed: int
) -> float:
    """Percent of the test images classified right after training."""
    torch.manual_seed(seed)
    images, classes = digits.train
    model = make_model(images.shape[1], chains, with_norm=with_norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test_images, test_classes = digits.test
    with torch.no_grad():
        hits = model(test_images).argmax(1) == test_classes
    return 100 * float(hits.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine
    digits, rows = Digits.load(), []
    cases = [(name, False) for name in SETTINGS]
    cases += [(name, True) for name, chains in SETTINGS.items() if chains]
    with Console().status("training"):
        for name, with_norm in cases:
            chains = SETTINGS[name]
            values = [
                accuracy(
                    digits, chains, with_norm=with_norm, num_epochs=arguments.epochs, seed=seed
                )
                for seed in range(arguments.seeds)
            ]
            model = make_model(digits.train[0].shape[1], chains, with_norm=with_norm)
            num_params = sum(p.numel() for p in model.parameters())
            case = f"{name}{', norm of each chain' * with_norm}, {num_params:,} parameters"
            note = f"mean {mean(values):.2f} ± {stdev(values):.2f}"
            if not with_norm:
                note += f"; the paper on CIFAR-10: {PAPER[name]}"
            rows.append(Row.of(case, values, "% right", "higher", note=note))
    show("CoM-MLP on digits", rows)
    print(f"written to {save('com_mlp', rows)}")


if __name__ == "__main__":
    main()
