"""Checkpoints of a run: weights, optimizer state and place in the schedule, all or nothing.

    run folder/checkpoint-00000600/
        config.json chain-<i>.safetensors    the model, as every model folder holds it
        adapters.safetensors                 what peft adds to the model, if it does
        optimizer.safetensors                AdamW's state of what trains, by parameter name
        state.json                           recipe, step and place in a streamed corpus

A checkpoint is renamed into place once it is whole, and the one before is kept, so a run that is
killed at any moment has one to go on from.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.files import new_folder
from colm_serve.model.checkpoint import carried_files, load_model, save_model
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig
from colm_serve.training.data_parallel import DataParallel, shard_like
from colm_serve.training.lora import adapter_tensors, merge_adapters
from colm_serve.training.tokenizer import load_tokenizer, save_tokenizer

_log = logging.getLogger(__name__)
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
_NUM_KEPT = 2
_ADAPTERS = "adapters.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A whole checkpoint: weights and AdamW's state by the parameter's name, and what each
    process's `Batches.state` said.
    """

    folder: Path
    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    batches: Mapping[str, Any]


def take_snapshot(
    run_folder: Path,
    group: DataParallel,
    model: ColmModel,
    optimizer: AdamW,
    batches: Mapping[str, Any],
    step: int,
) -> Snapshot:
    """The state after `step` steps. Every process calls it; the leader's holds the tensors."""
    if isinstance(model, FSDPModule):
        # A forward pass without a backward one leaves whole weights in place of the shards.
        model.reshard()
    weights = group.collect(model.named_parameters())
    state = group.collect(_optimizer_state(model, optimizer))
    folder = run_folder / f"checkpoint-{step:08d}"
    return Snapshot(folder, step, weights, state, group.merge(batches))


def save_snapshot(snapshot: Snapshot, config: TrainConfig) -> None:
    """Write a snapshot to its folder; older ones of the run but the last go away."""
    with new_folder(snapshot.folder) as staging:
        with torch.device("meta"):
            model = ColmModel(config.model)
        model.load_state_dict(snapshot.weights, strict=False, assign=True)
        tuning = config.tuning
        save_model(model, staging, first_files=tuning.frozen_files(tuning.base) if tuning else ())
        if adapters := adapter_tensors(snapshot.weights):
            save_file(adapters, staging / _ADAPTERS)
        save_file(dict(snapshot.optimizer), staging / "optimizer.safetensors")
        state = {
            "step": snapshot.step,
            "recipe": config.to_dict(),
            "batches": dict(snapshot.batches),
        }
        (staging / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
    # A later one can only be there damaged, and says nothing about which to keep.
    past = checkpoint_folders(snapshot.folder.parent)
    past = [folder for folder in past if folder.name <= snapshot.folder.name]
    for old in past[:-_NUM_KEPT]:
        shutil.rmtree(old)


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Checkpoints of the run, oldest first."""
    return sorted(run_folder.glob("checkpoint-*"))


def load_newest_snapshot(run_folder: Path, config: TrainConfig) -> Snapshot | None:
    """The newest checkpoint that can be read, or None when the run has none.

    Raises:
        InvalidConfig: it was written by another recipe; the message names the first difference.
    """
    for folder in reversed(checkpoint_folders(run_folder)):
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            step, recipe, batches = state["step"], state["recipe"], state["batches"]
            weights: dict[str, Tensor] = dict(load_model(folder).model.named_parameters())
            if (folder / _ADAPTERS).exists():
                weights |= load_file(folder / _ADAPTERS)
            optimizer = load_file(folder / "optimizer.safetensors")
        except (OSError, ValueError, KeyError, CheckpointError, SafetensorError) as error:
            _log.warning("%s cannot be read, trying the one before: %s", folder, error)
            continue
        _check_recipe(folder, config.to_dict(), recipe)
        if config.tuning is not None:
            config.tuning.check_same_base(folder)
        return Snapshot(folder, step, weights, optimizer, batches)
    return None


def export_model(run_folder: Path, config: TrainConfig, model_folder: Path) -> Path:
    """Make a model folder of the run's newest checkpoint, whether or not the run has ended.

    Raises:
        CheckpointError: the run has no checkpoint yet.
    """
    snapshot = load_newest_snapshot(run_folder, config)
    if snapshot is None:
        raise CheckpointError(f"{run_folder}: no checkpoint yet; train some more")
    model = load_model(snapshot.folder).model
    if config.tuning is None:
        save_model(model, model_folder)
        save_tokenizer(load_tokenizer(run_folder), model_folder, config.model.max_context)
    else:
        config.tuning.add_adapters(model, config.seed)
        restore_weights(snapshot, model)
        merge_adapters(model)
        save_model(model, model_folder, first_files=config.tuning.frozen_files(snapshot.folder))
        for path in carried_files(config.tuning.base):
            shutil.copyfile(path, model_folder / path.name)
    config.save(model_folder / "train.yaml")
    return model_folder


def restore_weights(snapshot: Snapshot, model: ColmModel) -> None:
    """Put a checkpoint's weights in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshot.weights[name])


def restore_optimizer(snapshot: Snapshot, model: ColmModel, optimizer: AdamW) -> None:
    """Put a checkpoint's moments in place, for the weights that train."""
    for name, parameter in _trained(model):
        # A head has none before its level is first drawn.
        if f"step.{name}" in snapshot.optimizer:
            optimizer.state[parameter] = {
                key: shard_like(snapshot.optimizer[f"{key}.{name}"], parameter)
                for key in _OPTIMIZER_STATE
            }


def _optimizer_state(model: ColmModel, optimizer: AdamW) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(model):
        if parameter in optimizer.state:
            for key in _OPTIMIZER_STATE:
                yield f"{key}.{name}", optimizer.state[parameter][key]


def _trained(model: ColmModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _check_recipe(folder: Path, asked: dict[str, object], found: dict[str, object]) -> None:
    for key in asked:
        if asked[key] != found.get(key):
            raise InvalidConfig(
                key,
                asked[key],
                f"{found.get(key)!r}, with which {folder.parent} was started; "
                "resume with that recipe, or train into another folder",
            )
