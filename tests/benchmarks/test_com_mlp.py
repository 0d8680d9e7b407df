from __future__ import annotations

import pytest
import torch
from com_mlp import SETTINGS, ChainMlp, make_model


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("MLP (dense)", 3_806_218),
        ("CoM-MLP {4,4,4,4}", 3_263_754),
        ("CoM-MLP {8,8}", 3_443_978),
        ("CoM-MLP {4,12}", 3_534_090),
        ("CoM-MLP {4,4,8}", 3_353_866),
    ],
)
def test_on_cifar_10_the_parameters_are_table_14_s(name: str, num_params: int) -> None:
    model = make_model(3 * 32 * 32, SETTINGS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == num_params


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_chain_sees_only_those_before_it(with_norm: bool) -> None:
    torch.manual_seed(0)
    model = ChainMlp(16, (4, 4, 8), with_norm=with_norm)
    hidden: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda _, __, out: hidden.append(out))
    images = torch.rand(5, 16)
    with torch.no_grad():
        model(images)
        model.embedding.weight[768 // 4 :] += 1  # the later chains' part of the embedding
        model(images)
    before, after = hidden
    assert torch.equal(before[:, : 256 // 4], after[:, : 256 // 4])
    assert not torch.equal(before[:, 256 // 4 :], after[:, 256 // 4 :])
