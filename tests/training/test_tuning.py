"""Later chains learn while the first ones, and all keys and values, stay what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from colm_serve.convert.expand import expand
from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.model.chain_file import chain_path
from colm_serve.model.checkpoint import load_model, save_model
from colm_serve.model.folder import ModelFolder
from colm_serve.model.initial import initial_model
from colm_serve.model.kv_identity import kv_identity
from colm_serve.model.layers import ChainLinear
from colm_serve.training import snapshot as snapshot_module
from colm_serve.training import tuning as tuning_module
from colm_serve.training.config import TrainConfig
from colm_serve.training.loss import multi_chain_loss
from colm_serve.training.report import Report, evaluate_folder
from colm_serve.training.snapshot import checkpoint_folders, export_model
from colm_serve.training.stage import stage_at
from colm_serve.training.tokenizer import save_tokenizer, train_tokenizer
from colm_serve.training.trainer import train
from colm_serve.training.tuning import Tuning
from tests.engine.paged import kv_of_whole_model
from tests.model.models import unseal
from tests.training.conftest import RECIPE
from tests.training.runs import MODEL, StopAfter, losses

#: Text of CPython's standard library.
DATA = Path(json.__file__).parent
ONE_CHAIN = replace(MODEL, chains=(1,), tie_embeddings=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of one chain with its tokenizer, in bf16, as imported ones are."""
    folder = tmp_path_factory.mktemp("base")
    config = replace(RECIPE, model=ONE_CHAIN, lower_levels=None, num_steps=60)
    result = train(config, folder, data=DATA, device="cpu")
    assert result.model_folder is not None
    save_model(load_model(result.model_folder).model, result.model_folder, torch.bfloat16)
    return result.model_folder


@pytest.fixture(scope="module")
def expanded(base: Path) -> Path:
    """The base with a second chain, which says nothing yet."""
    expand(base, base.with_name("expanded"), [4])
    return base.with_name("expanded")


@pytest.fixture(scope="module")
def tuned(expanded: Path) -> Path:
    return run_recipe(recipe_for(expanded), expanded.with_name("tuning"))


def recipe_for(base: Path, **changes: Any) -> TrainConfig:
    tuning = {"base": str(base), **changes.pop("tuning", {})}
    raw = replace(RECIPE, lower_levels=None, num_steps=40).to_dict() | changes
    return TrainConfig.from_dict({**raw, "model": None, "tuning": tuning})


def run_recipe(config: TrainConfig, run_folder: Path) -> Path:
    result = train(config, run_folder, data=DATA, device="cpu")
    assert result.model_folder is not None
    return result.model_folder


def heldout_losses(folder: Path) -> list[float]:
    """As the run has measured them."""
    return [level.heldout_loss for level in Report.load(folder).levels]


def assert_first_chain_is_kept(folder: Path, base: Path) -> None:
    """Its file to the byte, its keys and values to the bit."""
    assert chain_path(folder, 1).read_bytes() == chain_path(base, 1).read_bytes()
    assert kv_identity(folder) == kv_identity(base)
    tokens = list(range(40))
    expected = kv_of_whole_model(base, tokens, 1)
    for layer, found in kv_of_whole_model(folder, tokens, 2).items():
        assert all(map(torch.equal, found, expected[layer]))


def test_a_new_chain_lowers_the_loss_and_leaves_the_first_as_it_was(
    base: Path, expanded: Path, tuned: Path
) -> None:
    """Table 2's direction."""
    untuned = [level.heldout_loss for level in evaluate_folder(expanded, RECIPE, DATA).levels]
    level_1, level_2 = heldout_losses(tuned)
    assert untuned == [level_1, level_1]
    assert level_2 < level_1 - 0.05
    assert_first_chain_is_kept(tuned, base)


def test_lora_tunes_a_trained_chain_and_is_merged_into_its_file(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    config = recipe_for(tuned, tuning={"lora_rank": 4}, seed=8)
    folder = run_recipe(config, tmp_path)
    assert heldout_losses(folder)[1] < heldout_losses(tuned)[1]
    assert_first_chain_is_kept(folder, base)
    before, after = (load_model(f).model for f in (tuned, folder))
    for (name, weight), tuned_weight in zip(
        before.named_parameters(), after.parameters(), strict=True
    ):
        change = (tuned_weight - weight).detach()
        if name.startswith("blocks") and name.endswith("weights.1") and weight.ndim == 2:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, name
        else:
            assert not change.any(), name


def test_lora_trains_a_new_chain_s_head_as_a_whole(
    base: Path, expanded: Path, tmp_path: Path
) -> None:
    config = recipe_for(expanded, tuning={"lora_rank": 4})
    folder = run_recipe(config, tmp_path)
    level_1, level_2 = heldout_losses(folder)
    assert level_2 < level_1 - 0.05
    assert_first_chain_is_kept(folder, base)
    before, after = (load_model(f).model for f in (expanded, folder))
    for name, weight in before.named_parameters():
        change = (after.get_parameter(name) - weight).detach()
        if name.startswith("blocks") and name.endswith("weights.1") and weight.ndim == 2:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, name
        else:
            assert change.any() == (name == "head.weights.1"), name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "head.weights.2"),
        ({"head": "per_level"}, "head.weights.2"),
        ({"tie_embeddings": True}, "embedding.weights.2"),
    ],
)
def test_only_the_heads_of_new_chains_train_beside_adapters(
    changes: dict[str, Any], name: str
) -> None:
    model = initial_model(replace(MODEL, **{"tie_embeddings": False, **changes}), seed=0)
    tuning = Tuning(Path(), 1, lora_rank=2)
    tuning.add_adapters(model, seed=0)
    assert not [n for n in tuning.trained_names(model) if "lora_" not in n]
    assert model.head is not None
    with torch.no_grad():
        model.head.weights[2][:, -16:].zero_()  # as `expand` leaves what chain 3 adds
    assert [n for n in tuning.trained_names(model) if "lora_" not in n] == [name]


def test_a_checkpoint_holds_what_trains_and_no_more(
    expanded: Path, tuned: Path, tmp_path: Path
) -> None:
    for number, (base, lora_rank) in enumerate([(expanded, None), (tuned, 2), (expanded, 2)]):
        run = tmp_path / str(number)
        config = recipe_for(base, tuning={"lora_rank": lora_rank})
        train(config, run, data=DATA, device="cpu", stop=StopAfter(1))
        (folder,) = checkpoint_folders(run)
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            names = set(file.keys())
        if lora_rank is None:
            assert names == {
                n for n, _ in load_model(base).model.named_parameters() if n[-1] == "1"
            }
        else:
            others = {name for name in names if "lora_" not in name}
            assert others == ({"head.weights.1"} if base == expanded else set())


@pytest.mark.parametrize(("is_new", "lora_rank"), [(False, None), (False, 2), (True, 2)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    expanded: Path, tuned: Path, tmp_path: Path, is_new: bool, lora_rank: int | None
) -> None:
    base = expanded if is_new else tuned
    config = recipe_for(base, tuning={"lora_rank": lora_rank}, num_steps=10)
    straight = run_recipe(config, tmp_path / "straight")
    for num_steps in (4, 3):
        stop = StopAfter(num_steps)
        train(config, tmp_path / "stopped", data=DATA, device="cpu", stop=stop)
    resumed = run_recipe(config, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert ModelFolder.open(resumed).manifest == ModelFolder.open(straight).manifest


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_frozen_chains_take_no_part_in_the_backward_pass(lora_rank: int | None) -> None:
    """It costs a third less, and the gradients are the same."""
    config = replace(MODEL, chains=(4, 1), num_heads=10, d_model=320, d_ff=320)
    tokens = torch.arange(130).reshape(2, 65)
    gradients, num_flops = [], []
    for is_cut in (False, True):
        model = initial_model(config, seed=0)
        tuning = Tuning(Path(), 1, lora_rank)
        tuning.add_adapters(model, seed=0)
        tuning.freeze(model, tuning.trained_names(model))
        for module in model.modules():
            if isinstance(module, ChainLinear):
                module.num_frozen *= is_cut
        with FlopCounterMode(display=False) as counter:
            multi_chain_loss(model, tokens[:, :-1], tokens[:, 1:], (0, 1)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        num_flops.append(counter.get_total_flops())
    assert num_flops[1] < 0.75 * num_flops[0]
    assert gradients[0]
    assert not any(name.endswith("weights.0") for name in gradients[0])
    torch.testing.assert_close(*gradients)


def test_only_levels_above_the_frozen_ones_count(tuned: Path) -> None:
    three = tuned.with_name("three")
    expand(tuned, three, [4])
    for frozen, expected in ((0, (1 / 3, 1 / 3, 1 / 3)), (1, (0, 0.5, 0.5)), (2, (0, 0, 1))):
        config = recipe_for(three, tuning={"frozen_chains": frozen})
        stage, generator = stage_at(config, 0), np.random.default_rng(0)
        assert stage.level_weights(config, generator) == pytest.approx(expected)


@pytest.mark.parametrize(("chain", "lora_rank"), [(0, None), (1, 2)])
def test_a_base_that_was_replaced_meanwhile_is_refused(
    tuned: Path, tmp_path: Path, chain: int, lora_rank: int | None
) -> None:
    base = shutil.copytree(tuned, tmp_path / "base")
    config = recipe_for(base, tuning={"lora_rank": lora_rank})
    train(config, tmp_path / "run", data=DATA, device="cpu", stop=StopAfter(2))
    model = load_model(base).model
    with torch.no_grad():
        model.embedding.weights[chain].add_(1)
    save_model(model, base)
    with pytest.raises(InvalidConfig, match=r"tuning\.base: .*the model that .*run began with"):
        train(config, tmp_path / "run", data=DATA, device="cpu")


@pytest.mark.parametrize("moment", ["load_model", "merge_adapters", "copy_carried_files"])
def test_a_base_that_is_replaced_during_an_export_is_not_mixed(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While its weights are loaded, and while chains and tokenizer are copied."""
    base, out = shutil.copytree(tuned, tmp_path / "base"), tmp_path / "model"
    config = recipe_for(base, tuning={"lora_rank": 2})
    train(config, tmp_path / "run", data=DATA, device="cpu", stop=StopAfter(2))
    export_model(tmp_path / "run", config, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = load_model(base).model
    with torch.no_grad():
        other.embedding.weights[0].add_(1)
    module = tuning_module if moment == "load_model" else snapshot_module
    real = getattr(module, moment)

    def replace_base(*arguments: Any) -> Any:
        save_model(other, base)
        return real(*arguments)

    monkeypatch.setattr(module, moment, replace_base)
    with pytest.raises(CheckpointError, match=r"of another save|base: replaced while"):
        export_model(tmp_path / "run", config, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": {"frozen_chains": 2}}, r"tuning\.frozen_chains: 2 .*allowed: 0 to 1"),
        ({"tuning": {"frozen_chains": True}}, r"tuning\.frozen_chains: True"),
        ({"tuning": {"lora_rank": 0}}, r"tuning\.lora_rank: 0 .*a positive integer, or null"),
        ({"tuning": {"rank": 4}}, r"tuning: .*of the keys \['base', 'frozen_chains', 'lora_rank'"),
        (
            {"tuning": {"lora_rank": 2}, "backbone_steps": 5},
            "backbone_steps: 5 .*allowed: null",
        ),
        ({"lower_levels": 1}, "lower_levels: 1 .*allowed: 0 to 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    expanded: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        recipe_for(expanded, **changes)


def test_a_recipe_s_base_counts_from_the_recipe_s_folder(expanded: Path) -> None:
    config = recipe_for(expanded)
    recipe = expanded.parent / "recipes" / "tune.yaml"
    recipe.parent.mkdir()
    raw = config.to_dict() | {"model": None, "tuning": {"base": "../expanded"}}
    recipe.write_text(json.dumps(raw), "utf-8")
    assert TrainConfig.load(recipe) == config
    config.save(recipe)
    assert TrainConfig.load(recipe) == config, "an absolute path stays"


def truncate(base: Path) -> None:
    path = chain_path(base, 2)
    path.write_bytes(path.read_bytes()[:-100])


def widen(base: Path) -> None:
    unseal(base)
    path = base / "config.json"
    path.write_text(path.read_text("utf-8").replace('"d_ff": 64', '"d_ff": 128'), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"chain-2\.safetensors: truncated"),
        (widen, r"chain-1\.safetensors: tensor blocks\.0\.ffn\.w1\.weight has shape .*, expected"),
    ],
)
def test_a_damaged_base_is_refused_before_anything_is_written(
    expanded: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    base = shutil.copytree(expanded, tmp_path / "base")
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        train(recipe_for(base), tmp_path / "run", data=DATA, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_model_s_is_refused(tuned: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tuned, tmp_path / "model")
    for vocab_size, message in (
        (300, r"tokenizer\.json: of another model: it has token id 299, .*vocab_size is 280"),
        (None, r"tokenizer\.json: no such file"),
    ):
        (model / "tokenizer.json").unlink()
        if vocab_size is not None:
            save_tokenizer(
                train_tokenizer([Path(__file__).read_text("utf-8")], vocab_size), model, 64
            )
        with pytest.raises(CheckpointError, match=message):
            evaluate_folder(model, RECIPE, DATA)
        with pytest.raises(CheckpointError, match=message):
            train(recipe_for(model), tmp_path / "run", data=DATA, device="cpu")


def test_another_model_s_recipe_is_refused(expanded: Path, tmp_path: Path) -> None:
    config = replace(recipe_for(expanded), model=replace(ONE_CHAIN, chains=(2, 2)))
    with pytest.raises(InvalidConfig, match=r"model: .*allowed: what .*expanded/config\.json has"):
        train(config, tmp_path, data=DATA, device="cpu")
