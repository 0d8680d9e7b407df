"""LoRA on the later chains, by peft: adapters beside their matrices, merged in the end.

peft adapts `nn.Linear` modules, so each chain of a `ChainLinear` is made one; weights stay the
very parameters they were, and chain files know nothing of any of it.

Shapes: T rows (tokens), D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colm_serve.model.layers import ChainLinear
from colm_serve.model.transformer import ColmModel

_MARK = "lora_"


class ChainOfLinears(ChainLinear):
    """A `ChainLinear` over the same weights whose chains are `nn.Linear` modules."""

    def __init__(self, original: ChainLinear) -> None:
        nn.Module.__init__(self)
        self.weights, self.biases = original.weights, original.biases
        self.linears = nn.ModuleList(_as_linear(weight) for weight in self.weights)

    def forward(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        columns = []
        for i, rows in enumerate(num_rows):
            x = x_TD[:rows, : self.weights[i].shape[1]]
            y = self.linears[i](x.detach() if i < self.num_frozen else x)
            columns.append(F.pad(y, (0, 0, 0, x_TD.shape[0] - rows)))
        return torch.cat(columns, dim=-1)


def add_adapters(model: ColmModel, rank: int, first_chain: int, seed: int) -> None:
    """Put adapters beside every matrix in the blocks of the chains from `first_chain` on.

    Args:
        model: changed in place; says what it said until the adapters are trained.
        rank: of the product that is added to a matrix, with peft's scale of two.
        first_chain: counted from 1.
        seed: of the adapters' weights.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chain_linears = [(n, m) for n, m in model.named_modules() if isinstance(m, ChainLinear)]
    for name, module in chain_linears:
        model.set_submodule(name, ChainOfLinears(module))
    chains = "|".join(str(i) for i in range(first_chain - 1, model.num_chains))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=rf".*\.linears\.({chains})", bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _MARK in name


@torch.no_grad()
def merge_adapters(model: ColmModel) -> None:
    """Add the adapters' products to the chains' weights."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()


def _as_linear(weight: nn.Parameter) -> nn.Linear:
    out_width, in_width = weight.shape
    linear = nn.Linear(in_width, out_width, bias=False, device="meta")
    linear.weight = weight
    return linear
