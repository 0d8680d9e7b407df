from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from colm_serve.errors import InvalidConfig
from colm_serve.model.checkpoint import load_model
from colm_serve.model.initial import initial_model
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig
from colm_serve.training.snapshot import export_model
from colm_serve.training.stage import Stage, stage_at
from colm_serve.training.trainer import learning_rate, train
from tests.training.runs import MODEL, StopAfter, losses

MakeRecipe = Callable[..., TrainConfig]
UNTIED = replace(MODEL, tie_embeddings=False)
PER_LEVEL = replace(MODEL, tie_embeddings=False, head="per_level")


def trained_names(model: ColmModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_paper_s_stages_follow_each_other(recipe: MakeRecipe) -> None:
    config = recipe(model=UNTIED, backbone_steps=7)
    backbone, heads = Stage(0, 7, "backbone"), Stage(7, 12, "heads")
    assert [stage_at(config, step) for step in (0, 6, 7, 12)] == [backbone, backbone, heads, heads]
    assert stage_at(recipe(), 11) == Stage(0, 12, "all")


def test_each_stage_trains_its_weights_on_its_levels(recipe: MakeRecipe) -> None:
    config = recipe(model=PER_LEVEL, backbone_steps=7)
    model, generator = initial_model(config.model, config.seed), np.random.default_rng(0)
    everything = trained_names(model)
    heads = {f"head.weights.{i}" for i in range(3)}
    backbone_stage, heads_stage = stage_at(config, 0), stage_at(config, 7)

    backbone_stage.freeze_others(model)
    assert trained_names(model) == everything - {"head.weights.0", "head.weights.1"}
    assert backbone_stage.level_weights(config, generator) == (0, 0, 1)
    heads_stage.freeze_others(model)
    assert trained_names(model) == heads
    assert sum(weight > 0 for weight in heads_stage.level_weights(config, generator)) == 2


def test_each_stage_warms_up_and_decays(recipe: MakeRecipe) -> None:
    config = recipe(model=UNTIED, num_steps=30, backbone_steps=20, warmup_steps=5, peak_lr=1.0)
    rates = [learning_rate(config, step) for step in range(30)]
    alone = recipe(num_steps=20, warmup_steps=5, peak_lr=1.0)
    assert rates[:20] == [learning_rate(alone, step) for step in range(20)]
    assert rates[20:25] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[25:] == sorted(rates[25:], reverse=True)


@pytest.mark.parametrize("model", [UNTIED, PER_LEVEL])
def test_heads_train_on_a_frozen_backbone(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path, model: object
) -> None:
    config, run = recipe(model=model, backbone_steps=8), tmp_path / "run"
    train(config, run, data=corpus_folder, device="cpu", stop=StopAfter(8))
    before = export_model(run, config, tmp_path / "before")
    result = train(config, run, data=corpus_folder, device="cpu")
    assert result.model_folder is not None
    old, new = (load_model(folder).model for folder in (before, result.model_folder))
    for name, weight in new.named_parameters():
        assert torch.equal(weight, old.get_parameter(name)) != name.startswith("head."), name


@pytest.mark.parametrize("num_steps", [6, 8, 9])
def test_a_run_resumes_on_either_side_of_the_boundary(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path, num_steps: int
) -> None:
    config, run = recipe(model=PER_LEVEL, backbone_steps=8), tmp_path / "run"
    straight = tmp_path / "straight"
    assert train(config, straight, data=corpus_folder, device="cpu").finished
    # The loop looks once a step, and once more between the stages.
    stop = StopAfter(num_steps + (num_steps > 8))
    assert train(config, run, data=corpus_folder, device="cpu", stop=stop).num_steps == num_steps
    assert train(config, run, data=corpus_folder, device="cpu").finished
    assert len(losses(run)) == 12
    assert losses(run) == losses(straight)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("backbone_steps", {"backbone_steps": 0}),
        ("backbone_steps", {"backbone_steps": 12}),
        ("backbone_steps", {"backbone_steps": 6, "model": MODEL}),
        ("warmup_steps", {"backbone_steps": 11}),
        ("recompute_activations", {"recompute_activations": 1}),
    ],
)
def test_stages_that_cannot_be_are_refused(
    recipe: MakeRecipe, key: str, changes: dict[str, object]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        recipe(**{"model": UNTIED, **changes})
    assert caught.value.key == key
