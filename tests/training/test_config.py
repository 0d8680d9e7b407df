from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from colm_serve.errors import InvalidConfig
from colm_serve.training.config import TrainConfig

BUNDLED = Path(__file__).parents[2] / "models" / "stdlib-air" / "train.yaml"


def test_bundled_recipe_loads() -> None:
    config = TrainConfig.load(BUNDLED)
    assert config.model.kv_sharing == "air"
    assert config.tokens_per_step == config.num_micro_batches * 2 * config.seq_len


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_steps", 0),
        ("num_steps", "many"),
        ("num_steps", 1.5),
        ("seed", -1),
        ("peak_lr", "fast"),
        ("peak_lr", True),
        ("warmup_steps", 13),
        ("seq_len", 65),
        ("sequences_per_step", 5),
        ("lower_levels", 3),
        ("final_lr_fraction", 1.5),
        ("heldout_fraction", 1),
        ("precision", "fp8"),
        ("text_field", ""),
        ("text_field", 3),
        ("checkpoint_interval_s", 0),
    ],
)
def test_error_names_key_value_and_what_is_allowed(
    recipe: Callable[..., TrainConfig], key: str, value: object
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        recipe(**{key: value})
    assert caught.value.key == key
    assert f"{key}: {value!r} is not allowed; allowed: " in str(caught.value)


def test_recipe_survives_yaml(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    recipe(exclude=("a/*",)).save(path)
    assert TrainConfig.load(path) == recipe(exclude=("a/*",))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("steps: 4", "steps"),
        ("num_steps: 4", "model"),
        ("model: {depth: 3}", "depth"),
        ("model: [", "config"),
        ("- 1", "config"),
    ],
)
def test_unknown_keys_and_bad_files_fail(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig.load(path)
    assert caught.value.key == key


def test_missing_keys_are_named() -> None:
    content = yaml.safe_load(BUNDLED.read_text("utf-8"))
    del content["peak_lr"]
    with pytest.raises(InvalidConfig, match="peak_lr"):
        TrainConfig.from_dict(content)


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="a readable file"):
        TrainConfig.load(tmp_path / "missing.yaml")
