"""Checkpoints of a run: weights, optimizer state and place in the schedule, all or nothing.

    run folder/checkpoint-00000600/
        weights.safetensors      what the run trains, by parameter name
        optimizer.safetensors    AdamW's state of what trains now, by parameter name
        state.json               recipe, step, place in a streamed corpus, and the digests of these
                                 files and of the tuned model's, which hold the other weights

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
from torch.optim import AdamW

from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.files import new_folder, writing
from colm_serve.model.checkpoint import copy_carried_files, write_model
from colm_serve.model.content_digest import content_digest
from colm_serve.model.folder import new_model
from colm_serve.model.transformer import ColmModel
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.config import TrainConfig
from colm_serve.training.data_parallel import DataParallel
from colm_serve.training.lora import merge_adapters
from colm_serve.training.starting_point import StartingPoint
from colm_serve.training.tokenizer import save_tokenizer

_log = logging.getLogger(__name__)
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
_NUM_KEPT = 2
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A whole checkpoint.

    Attributes:
        weights: what the run trains, by the parameter's name.
        optimizer: AdamW's state, by its key and the parameter's name.
        batches: what `Batches.state` said in the processes.
        base_digests: of the chain files that hold all other weights.
    """

    folder: Path
    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    batches: Mapping[str, Any]
    base_digests: tuple[str, ...]


def take_snapshot(
    run_folder: Path,
    group: DataParallel,
    start: StartingPoint,
    optimizer: AdamW,
    batches: Mapping[str, Any],
    step: int,
) -> Snapshot:
    """The state after `step` steps. Every process calls it; the leader's holds the tensors."""
    model = start.model
    group.reshard(model)
    return Snapshot(
        run_folder / f"checkpoint-{step:08d}",
        step,
        group.collect((n, p) for n, p in model.named_parameters() if n in start.trained_names),
        group.collect(_optimizer_state(model, optimizer)),
        group.merge(batches),
        start.base_digests,
    )


def save_snapshot(snapshot: Snapshot, config: TrainConfig) -> None:
    """Write a snapshot to its folder; older ones of the run but the last go away.

    Raises:
        WriteFailed: as on a full disk; the older ones are still there.
    """
    files = {_WEIGHTS: snapshot.weights, _OPTIMIZER: snapshot.optimizer}
    state = {
        "step": snapshot.step,
        "recipe": config.to_dict(),
        "batches": dict(snapshot.batches),
        "digests": {name: _digest(tensors) for name, tensors in files.items()},
        "base_digests": snapshot.base_digests,
    }
    with new_folder(snapshot.folder) as staging:
        for name, tensors in files.items():
            with writing(staging / name):
                save_file(dict(tensors), staging / name)
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
            recipe = state["recipe"]
            snapshot = Snapshot(
                folder,
                state["step"],
                _read(folder / _WEIGHTS, state["digests"]),
                _read(folder / _OPTIMIZER, state["digests"]),
                state["batches"],
                tuple(state["base_digests"]),
            )
        except (OSError, ValueError, KeyError, CheckpointError, SafetensorError) as error:
            _log.warning("%s cannot be read, trying the one before: %s", folder, error)
            continue
        _check_recipe(folder, config.to_dict(), recipe)
        return snapshot
    return None


def export_model(run_folder: Path, config: TrainConfig, model_folder: Path) -> Path:
    """Make a model folder of the run's newest checkpoint, whether or not the run has ended.

    What `model_folder` was before is replaced in one step, as by `save_model`.

    Raises:
        CheckpointError: the run has no checkpoint yet.
        InvalidConfig: as `restore_weights`.
    """
    snapshot = load_newest_snapshot(run_folder, config)
    if snapshot is None:
        raise CheckpointError(f"{run_folder}: no checkpoint yet; train some more")
    start = StartingPoint.of(config)
    restore_weights(snapshot, start)
    with new_model(model_folder) as staging:
        if config.tuning is None or start.base is None:
            write_model(start.model, staging)
            tokenizer = load_model_tokenizer(run_folder, config.model.vocab_size)
            save_tokenizer(tokenizer, staging, config.model.max_context)
        else:
            merge_adapters(start.model)
            frozen = start.base.chains()[: config.tuning.frozen_chains]
            write_model(start.model, staging, first_chains=frozen)
            copy_carried_files(start.base, staging)
        config.save(staging / "train.yaml")
    return model_folder


def restore_weights(snapshot: Snapshot, start: StartingPoint) -> None:
    """Put a checkpoint's weights in place.

    Raises:
        InvalidConfig: the base, which has the others, is not the model that the run began with.
    """
    if start.base_digests != snapshot.base_digests:
        assert start.base is not None
        allowed = f"the model that {snapshot.folder.parent} began with"
        raise InvalidConfig("tuning.base", str(start.base.path), allowed)
    with torch.no_grad():
        for name, parameter in start.model.named_parameters():
            if name in start.trained_names:
                parameter.copy_(snapshot.weights[name])


def restore_optimizer(
    snapshot: Snapshot, group: DataParallel, model: ColmModel, optimizer: AdamW
) -> None:
    """Put a checkpoint's moments in place, for the weights that train."""
    for name, parameter in _trained(model):
        # A head has none before its level is first drawn.
        if f"step.{name}" in snapshot.optimizer:
            optimizer.state[parameter] = {
                key: group.share(snapshot.optimizer[f"{key}.{name}"], parameter)
                for key in _OPTIMIZER_STATE
            }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return content_digest(tensors, tensors.__getitem__)


def _read(path: Path, digests: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    if _digest(tensors) != digests[path.name]:
        raise CheckpointError(f"{path}: damaged: its content does not match its digest")
    return tensors


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
