"""Put a loaded model's matrices into the layout that the CPU multiplies fastest."""

from __future__ import annotations

from torch import nn

from colm_serve.kernels import staircase_linear_onednn
from colm_serve.model.layers import ChainLinear, PerLevelHead, SharedHead
from colm_serve.model.transformer import ColmModel


def pack_for_cpu(model: ColmModel) -> None:
    """Replace the weights of linear layers and heads by packed ones; embeddings stay as they are.

    For inference only: a packed model can be neither trained nor saved. A head that is tied to
    the embedding becomes a packed copy of it, since a look-up needs plain rows.
    """
    if not staircase_linear_onednn.is_available():
        return
    for module in model.modules():
        if isinstance(module, ChainLinear | SharedHead | PerLevelHead):
            # One at a time: each plain matrix goes before the next packed one comes.
            packed = nn.ParameterList()
            for weight in module.weights:
                matrix = staircase_linear_onednn.pack(weight.detach())
                packed.append(nn.Parameter(matrix, requires_grad=False))
            module.weights = packed
