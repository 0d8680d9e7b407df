"""What a worker makes of a model folder and of its config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colm_serve.engine import loading
from colm_serve.engine.loading import load_for_serving, make_pool, to_serving
from colm_serve.engine.step import Segment, run_pass
from colm_serve.errors import InvalidConfig
from colm_serve.model.checkpoint import LoadedModel, load_model
from colm_serve.model.serving import ServingModel


def scores(model: ServingModel) -> torch.Tensor:
    pool = make_pool(LoadedModel(model, ""), 2, 16)
    segment = Segment(range(20), 0, 3, pool.table([1, 0]), num_scored=20)
    return run_pass(model, pool, [segment]).logits_SV


def test_smaller_weights_are_the_same_model_but_for_rounding(folder: Path) -> None:
    exact = load_for_serving(folder, num_chains=None, with_head=True)
    for name, tolerance in (("float32", 0.0), ("bfloat16", 0.02), ("int8", 0.05)):
        small = load_for_serving(folder, num_chains=None, with_head=True, weight_dtype=name)
        assert small.kv_identity == exact.kv_identity
        expected = scores(exact.model)
        error = float((scores(small.model) - expected).norm() / expected.norm())
        assert error <= tolerance
        assert (error > 0) == (tolerance > 0), "the dtype was not used"


def test_a_gpu_keeps_weights_in_bfloat16_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "pick_device", lambda: torch.device("cuda"))
    with pytest.raises(InvalidConfig, match=r"decode\.weight_dtype.*int8.*auto or bfloat16"):
        load_for_serving(folder, num_chains=None, with_head=True, weight_dtype="int8")


def test_a_model_in_memory_serves_as_its_folder_does(folder: Path) -> None:
    loaded = load_for_serving(folder, num_chains=None, with_head=True)
    assert torch.equal(scores(to_serving(load_model(folder).model)), scores(loaded.model))
