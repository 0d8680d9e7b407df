"""Pre-train a CoLM from a recipe, surviving kills."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from colm_serve.model.checkpoint import check_folder
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig
from colm_serve.training.data_parallel import DataParallel, join_processes
from colm_serve.training.dataset import Dataset, prepare_dataset
from colm_serve.training.loss import LevelLoss, evaluate, multi_chain_loss
from colm_serve.training.metrics import MetricsLog
from colm_serve.training.progress import Progress
from colm_serve.training.report import evaluate_folder
from colm_serve.training.snapshot import (
    export_model,
    load_newest_snapshot,
    restore_optimizer,
    restore_weights,
    save_snapshot,
    take_snapshot,
)
from colm_serve.training.stage import stage_at
from colm_serve.training.starting_point import StartingPoint
from colm_serve.training.stop_signal import StopSignal
from colm_serve.training.tokenizer import token_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a call of `train` ended.

    Attributes:
        num_steps: optimizer steps behind the weights.
        finished: False when a signal ended the run early; the same call resumes it.
        model_folder: the trained model, once finished; the leading process writes it.
    """

    num_steps: int
    finished: bool
    model_folder: Path | None


def train(
    config: TrainConfig,
    run_folder: Path,
    *,
    data: Path | None = None,
    device: str | None = None,
    stop: StopSignal | None = None,
) -> TrainResult:
    """Train, or go on training, until the recipe's last step; then write `run_folder/model`
    and its held-out loss.

    SIGTERM and Ctrl-C write a checkpoint and return. A folder that holds a checkpoint of the same
    recipe is resumed, and reaches the very weights an uninterrupted run on that machine would.
    Processes that torchrun starts train together; another number of them may resume the run.

    Args:
        config: the recipe.
        run_folder: created; holds tokens, checkpoints, `metrics.jsonl` and the model.
        data: a folder of text files; default: the recipe's stream, or else the interpreter's
            standard library.
        device: default: cuda where there is one, else cpu.
        stop: asks the run to stop; default: one that listens to SIGTERM and SIGINT.

    Raises:
        InvalidConfig: the folder holds a run of another recipe or corpus, a step's sequences
            cannot be shared evenly among the processes, or the stream cannot be opened.
        InvalidArgument: the corpus is missing or too small.
        CheckpointError: the model to be tuned is missing or damaged.
        Unavailable: the stream's hub cannot be reached.
    """
    if config.tuning:
        check_folder(config.tuning.base)
    run_folder.mkdir(parents=True, exist_ok=True)
    with join_processes(device) as group, stop or StopSignal.on_signals() as stop:
        group.check_shares(config)
        with group.leader_first():
            dataset = prepare_dataset(config, run_folder, data)
        trainer = Trainer(config, run_folder, dataset, group)
        trainer.run(stop)
        while trainer.step < config.num_steps and not group.any(stop.requested):
            # The next stage begins as a resumed run does.
            trainer = Trainer(config, run_folder, dataset, group)
            trainer.run(stop)
    model_folder = run_folder / "model"
    if trainer.step < config.num_steps:
        return TrainResult(trainer.step, False, None)
    if group.leads:
        export_model(run_folder, config, model_folder)
        evaluate_folder(model_folder, config, data).save(model_folder)
    return TrainResult(trainer.step, True, model_folder)


class Trainer:
    """One stage of a run: `step` of the run's optimizer steps are done."""

    def __init__(
        self, config: TrainConfig, run_folder: Path, dataset: Dataset, group: DataParallel
    ) -> None:
        self.config = config
        self.run_folder = run_folder
        self.dataset = dataset
        self.group = group
        snapshot = load_newest_snapshot(run_folder, config)
        self.batches = dataset.open_batches(snapshot.batches if snapshot else {})
        self.step = snapshot.step if snapshot else 0
        self.stage = stage_at(config, self.step)
        self.start = StartingPoint.of(config)
        self.model = self.start.model
        self.model.recompute_activations = config.recompute_activations
        if snapshot:
            restore_weights(snapshot, self.start)
        self.model.to(group.device)
        self.stage.freeze_others(self.model)
        if config.tuning:
            config.tuning.freeze(self.model, self.start.trained_names)
        group.shard(self.model)
        self.optimizer = _make_optimizer(self.model, config)
        if snapshot and self.step > self.stage.first_step:
            restore_optimizer(snapshot, group, self.model, self.optimizer)
        if snapshot:
            _log.info("going on from %s: training %s", snapshot.folder, self.stage.trains)
        self.metrics = MetricsLog(run_folder / "metrics.jsonl", self.step) if group.leads else None

    def run(self, stop: StopSignal) -> None:
        """Step until the stage ends or `stop` is asked for; either way leave a checkpoint."""
        config, group = self.config, self.group
        saved_step, saved_at = self.step, time.monotonic()
        with Progress(config, self.step) as progress:
            while self.step < self.stage.end_step and not group.any(stop.requested):
                started = time.monotonic()
                loss, grad_norm = self.train_step()
                progress.advance(self.step, loss, time.monotonic() - started)
                self._record(loss, grad_norm, time.monotonic() - started)
                if self.step % config.eval_interval_steps == 0:
                    progress.show_heldout(self.step, self._evaluate())
                if group.any(time.monotonic() - saved_at >= config.checkpoint_interval_s):
                    self.save()
                    saved_step, saved_at = self.step, time.monotonic()
        if self.step > saved_step:
            self.save()

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; its loss and gradient norm."""
        config = self.config
        # Levels and windows are drawn from streams of their own.
        generator = np.random.default_rng([config.seed, self.step, 1])
        total = torch.zeros((), device=self.group.device)
        for i in range(config.num_micro_batches):
            weights = self.stage.level_weights(config, generator)
            if i % self.group.num_processes == self.group.rank:
                rows_BS = torch.from_numpy(self.batches.micro_batch(self.step, i))
                total += self._accumulate(rows_BS.to(self.group.device), weights)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return self.group.mean(total).item(), self.group.whole(grad_norm).item()

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        snapshot = take_snapshot(
            self.run_folder,
            self.group,
            self.start,
            self.optimizer,
            self.batches.state(),
            self.step,
        )
        if self.group.leads:
            save_snapshot(snapshot, self.config)
        self.group.wait_for_all()

    def _accumulate(self, rows_BS: Tensor, level_weights: Sequence[float]) -> Tensor:
        """Add to the gradients; the loss, in units whose mean over the processes is the step's."""
        with self._precision():
            loss = multi_chain_loss(self.model, rows_BS[:, :-1], rows_BS[:, 1:], level_weights)
        loss = loss * self.group.num_processes / self.config.num_micro_batches
        loss.backward()
        return loss.detach()

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.group.device.type, torch.bfloat16)

    def _evaluate(self) -> list[LevelLoss]:
        losses = evaluate(
            self.model,
            self.dataset.heldout,
            token_bytes(self.dataset.tokenizer),
            seq_len=self.config.seq_len,
            sequences_per_batch=self.config.sequences_per_micro_batch,
            max_tokens=self.config.eval_tokens,
        )
        nats = [round(loss.nats_per_token, 4) for loss in losses]
        self._log_metrics({"step": self.step, "heldout_loss": nats})
        return losses

    def _record(self, loss: float, grad_norm: float, elapsed_s: float) -> None:
        if self.step % self.config.log_interval_steps:
            return
        self._log_metrics(
            {
                "step": self.step,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": learning_rate(self.config, self.step - 1),
                "tokens_per_s": round(self.config.tokens_per_step / elapsed_s),
            }
        )

    def _log_metrics(self, row: dict[str, object]) -> None:
        if self.metrics:
            self.metrics.append(row)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0: linear warm-up, then a cosine, both
    within the step's stage."""
    stage = stage_at(config, step)
    num_done, num_steps = step - stage.first_step, stage.end_step - stage.first_step
    if num_done < config.warmup_steps:
        return config.peak_lr * (num_done + 1) / config.warmup_steps
    done = (num_done - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.peak_lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def _make_optimizer(model: ColmModel, config: TrainConfig) -> AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=True)
