"""Put a model's matrices into the layout that the CPU multiplies fastest.

For inference only: a packed model can be neither trained nor saved.
"""

from __future__ import annotations

from torch import nn

from colm_serve.kernels import staircase_linear_onednn
from colm_serve.model.layers import ChainLinear, PerLevelHead, SharedHead
from colm_serve.model.transformer import ColmModel


def pack_for_cpu(model: ColmModel) -> None:
    """Replace the weights of linear layers and heads by packed ones; embeddings stay plain."""
    for chain in range(1, model.num_chains + 1):
        pack_chain(model, chain)


def pack_chain(model: ColmModel, chain: int) -> None:
    """Pack what chain `chain` adds, and copy the rest of it out of the file it was read from.

    Done chain by chain while loading, so that no more than one file stays mapped beside the
    packed weights. A head that is tied to the embedding becomes a packed copy of it, since a
    look-up needs plain rows.
    """
    if not staircase_linear_onednn.is_available():
        return
    index = chain - 1
    for module in model.modules():
        weights = getattr(module, "weights", None)
        if not isinstance(weights, nn.ParameterList) or index >= len(weights):
            continue
        if isinstance(module, ChainLinear | SharedHead | PerLevelHead):
            is_tied = module is model.head and model.config.tie_embeddings
            plain = (model.embedding.weights if is_tied else weights)[index].detach()
            if weights is model.embedding.weights:
                module.weights = weights = nn.ParameterList(list(weights))
            kept = staircase_linear_onednn.pack(plain)
        else:
            kept = weights[index].detach().clone()
        weights[index] = nn.Parameter(kept, requires_grad=False)
