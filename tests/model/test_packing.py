"""A model packed for serving is the model that was loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.engine.loading import load_for_serving
from colm_serve.model.checkpoint import load_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import level_rows
from tests.helpers import TINY, make_model_folder

VARIANTS = {
    "shared": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "per_level": replace(TINY, head="per_level"),
    "gelu": replace(TINY, ffn="gelu"),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_packed_logits_are_the_loaded_model_s(name: str, tmp_path: Path) -> None:
    config: ColmConfig = VARIANTS[name]
    folder = make_model_folder(tmp_path / "model", config)
    plain = load_model(folder).model
    packed = load_for_serving(folder, num_chains=None, with_head=True).model
    tokens, levels = torch.arange(36).view(4, 9), [3, 2, 2, 1]
    num_rows = [rows * 9 for rows in level_rows(levels)]
    expected = plain.logits(plain.hidden_states(tokens, levels), num_rows)
    actual = packed.logits(packed.hidden_states(tokens, levels), num_rows)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_linear_weights_are_packed_and_embeddings_are_not(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", replace(TINY, tie_embeddings=True))
    model = load_for_serving(folder, num_chains=None, with_head=True).model
    packed = {name for name, weight in model.named_parameters() if weight.is_mkldnn}
    plain = {name for name, _ in model.named_parameters()} - packed
    assert {name.split(".")[0] for name in packed} == {"blocks", "head"}
    assert all("norm" in name or name.startswith("embedding") for name in plain)
