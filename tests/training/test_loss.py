from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.model.initial import initial_model
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig
from colm_serve.training.loss import draw_level_weights, evaluate, multi_chain_loss


@pytest.fixture
def model(recipe: Callable[..., TrainConfig]) -> ColmModel:
    config = recipe()
    return initial_model(config.model, config.seed)


def level_loss(model: ColmModel, level: int, rows_BS: Tensor) -> Tensor:
    """Loss of one level, computed at that level alone."""
    num_rows = [rows_BS[:, 1:].numel()] * level
    hidden = model.hidden_states(rows_BS[:, :-1], [level] * len(rows_BS))
    return F.cross_entropy(model.logits(hidden, num_rows), rows_BS[:, 1:].flatten())


def test_multi_chain_loss_is_the_mean_of_the_levels_own(model: ColmModel) -> None:
    rows = torch.randint(280, (3, 17), generator=torch.Generator().manual_seed(0))
    separately = torch.stack([level_loss(model, level, rows) for level in (1, 2, 3)]).mean()
    together = multi_chain_loss(model, rows[:, :-1], rows[:, 1:], [1 / 3] * 3)
    torch.testing.assert_close(together, separately)

    weights = list(model.parameters())
    for got, expected in zip(
        torch.autograd.grad(together, weights),
        torch.autograd.grad(separately, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_a_level_without_weight_is_left_out(model: ColmModel) -> None:
    rows = torch.randint(280, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = multi_chain_loss(model, rows[:, :-1], rows[:, 1:], [0.75, 0.0, 0.25])
    expected = 0.75 * level_loss(model, 1, rows) + 0.25 * level_loss(model, 3, rows)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("lower_levels", [0, 1, 2, None])
def test_drawn_weights_sum_to_one_and_average_to_the_mean(lower_levels: int | None) -> None:
    generator = np.random.default_rng(0)
    drawn = np.array([draw_level_weights(4, lower_levels, generator) for _ in range(4000)])
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    expected = [0, 0, 0, 1] if lower_levels == 0 else [0.25] * 4
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.02)
    num_counted = 4 if lower_levels is None else lower_levels + 1
    assert set((drawn > 0).sum(axis=1)) == {num_counted}


def test_evaluate_measures_each_level_over_whole_windows(model: ColmModel) -> None:
    tokens = np.random.default_rng(0).integers(280, size=100).astype(np.uint16)
    sizes = np.full(280, 2)
    losses = evaluate(model, tokens, sizes, seq_len=24, sequences_per_batch=3)
    windows = np.stack([tokens[i : i + 25] for i in range(0, 96, 24)]).astype(np.int64)
    with torch.no_grad():
        for loss in losses:
            expected = level_loss(model, loss.level, torch.from_numpy(windows)).item()
            assert loss.nats_per_token == pytest.approx(expected, rel=1e-5)
            assert loss.bits_per_byte == pytest.approx(expected / 2 / math.log(2), rel=1e-5)


def test_evaluate_needs_a_window(model: ColmModel) -> None:
    with pytest.raises(ValueError, match="do not fill a window"):
        evaluate(model, np.zeros(24, np.uint16), np.ones(280, np.int64), seq_len=24)
