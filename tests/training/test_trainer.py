from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from colm_serve.errors import CheckpointError, InvalidArgument, InvalidConfig, WriteFailed
from colm_serve.model.checkpoint import load_model
from colm_serve.model.initial import initial_model
from colm_serve.training.batches import StoredBatches
from colm_serve.training.config import TrainConfig
from colm_serve.training.report import Report
from colm_serve.training.snapshot import checkpoint_folders, export_model
from colm_serve.training.stop_signal import StopSignal
from colm_serve.training.trainer import learning_rate, train
from tests.full_disk import full_disk
from tests.training.runs import StopAfter, losses

MakeRecipe = Callable[..., TrainConfig]

#: Trains in a process of its own, so that it can be killed.
_SCRIPT = """
import json, sys, torch
from pathlib import Path
from colm_serve.training.config import TrainConfig
from colm_serve.training.trainer import train
torch.set_num_threads(1)
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
result = train(config, Path(sys.argv[2]), data=Path(sys.argv[3]), device="cpu")
print(json.dumps([result.num_steps, result.finished]))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_every_levels_heldout_loss(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path, precision: str
) -> None:
    config = recipe(precision=precision, num_steps=30)
    result = train(config, tmp_path / "run", data=corpus_folder, device="cpu")
    assert result.finished
    assert result.model_folder is not None
    report = Report.load(result.model_folder)
    untrained = np.log(config.model.vocab_size)
    assert all(level.heldout_loss < untrained - 1 for level in report.levels)
    history = losses(tmp_path / "run")
    assert list(history) == list(range(1, 31))
    assert history[30] < history[1] - 1
    assert load_model(result.model_folder).model.num_chains == 3
    assert [level.active_params for level in report.levels] == [
        config.model.num_params(level) for level in (1, 2, 3)
    ]


@pytest.mark.parametrize("kill_signal", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path, kill_signal: signal.Signals
) -> None:
    config = recipe(num_steps=150, checkpoint_interval_s=0.3, eval_interval_steps=1000)
    killed = tmp_path / "killed"
    arguments = [json.dumps(config.to_dict()), str(killed), str(corpus_folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 60
    while len(losses(killed)) < 20 or not checkpoint_folders(killed):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(kill_signal)
    output = process.communicate(timeout=30)[0]

    step_at_kill = max(losses(killed))
    assert step_at_kill < config.num_steps
    if kill_signal is signal.SIGTERM:
        assert process.returncode == 0
        assert json.loads(output.splitlines()[-1]) == [step_at_kill, False]
        assert checkpoint_folders(killed)[-1].name == f"checkpoint-{step_at_kill:08d}"
    resumed = train(config, killed, data=corpus_folder, device="cpu")
    straight = train(config, tmp_path / "straight", data=corpus_folder, device="cpu")

    assert losses(killed) == losses(tmp_path / "straight")
    assert resumed.model_folder is not None
    assert straight.model_folder is not None
    for name, weight in load_model(resumed.model_folder).model.named_parameters():
        other = load_model(straight.model_folder).model.get_parameter(name)
        assert torch.equal(weight, other), name


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_half_written_and_damaged_checkpoints_are_passed_over(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    config, run = recipe(checkpoint_interval_s=1e-6), tmp_path / "run"
    result = train(config, run, data=corpus_folder, device="cpu", stop=StopAfter(6))
    assert (result.num_steps, result.finished, result.model_folder) == (6, False, None)
    assert [f.name for f in checkpoint_folders(run)] == [
        "checkpoint-00000005",
        "checkpoint-00000006",
    ]
    newest = checkpoint_folders(run)[-1]
    # As a kill leaves it: in the staging folder, without the last file.
    half_written = run / ".checkpoint-00000007.0a1b2c3d.colm-tmp"
    shutil.copytree(newest, half_written)
    (half_written / "state.json").unlink()
    damage(newest)

    resumed = train(config, run, data=corpus_folder, device="cpu")
    straight = train(config, tmp_path / "straight", data=corpus_folder, device="cpu")
    assert resumed.finished
    assert straight.finished
    assert losses(run) == losses(tmp_path / "straight")
    assert len(checkpoint_folders(run)) == 2
    assert not half_written.exists()


def test_another_recipe_or_corpus_in_the_same_folder_is_refused(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(recipe(), run, data=corpus_folder, device="cpu", stop=StopAfter(2))
    with pytest.raises(InvalidConfig, match=r"peak_lr: 0.5 .* 0.01, with which") as caught:
        train(recipe(peak_lr=0.5), run, data=corpus_folder, device="cpu")
    assert caught.value.key == "peak_lr"
    (corpus_folder / "new.py").write_text("x = 1\n", "utf-8")
    with pytest.raises(InvalidConfig, match="the corpus that") as caught:
        train(recipe(), run, data=corpus_folder, device="cpu")
    assert caught.value.key == "data"


def test_a_running_run_can_be_exported(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(recipe(), run, data=corpus_folder, device="cpu", stop=StopAfter(0))
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_model(run, recipe(), tmp_path / "model")
    train(recipe(), run, data=corpus_folder, device="cpu", stop=StopAfter(3))
    export_model(run, recipe(), tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "chain-1.safetensors",
        "chain-2.safetensors",
        "chain-3.safetensors",
        "config.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.yaml",
    ]
    assert TrainConfig.load(tmp_path / "model" / "train.yaml") == recipe()


def test_vocabulary_must_match_the_corpus(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path
) -> None:
    model = type(recipe().model).from_dict({**recipe().model.to_dict(), "vocab_size": 5000})
    with pytest.raises(InvalidConfig, match=r"model.vocab_size: 5000 .* tokens that the corpus"):
        train(recipe(model=model), tmp_path / "run", data=corpus_folder, device="cpu")


def test_too_small_a_corpus_is_refused(recipe: MakeRecipe) -> None:
    with pytest.raises(InvalidArgument, match="two of seq_len"):
        StoredBatches(np.zeros(64, np.uint16), recipe())


def test_an_epoch_reads_every_window_once(recipe: MakeRecipe) -> None:
    tokens = np.arange(32 * 14, dtype=np.uint16)
    batches = StoredBatches(tokens, recipe())
    places = [(step, index) for step in range(3) for index in range(2)]
    first_epoch = np.concatenate([batches.micro_batch(*place) for place in places])
    starts = first_epoch[:, 0]
    assert len(set(starts)) == 12
    assert len(set(starts % 32)) == 1
    assert (np.diff(first_epoch) == 1).all()
    again, other = StoredBatches(tokens, recipe()), StoredBatches(tokens, recipe(seed=8))
    np.testing.assert_array_equal(batches.micro_batch(1, 1), again.micro_batch(1, 1))
    assert not np.array_equal(batches.micro_batch(1, 1), other.micro_batch(1, 1))


def test_learning_rate_warms_up_and_decays(recipe: MakeRecipe) -> None:
    config = recipe(num_steps=100, warmup_steps=10, peak_lr=1.0, final_lr_fraction=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_initial_weights_follow_the_seed_and_leave_torchs_own_alone(recipe: MakeRecipe) -> None:
    before = torch.get_rng_state()
    first, second, other = (initial_model(recipe().model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.embedding.weights[0] for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_first_signal_asks_second_interrupts() -> None:
    # A shell's background job starts with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal.on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_full_disk_ends_a_run_that_can_go_on_later(
    recipe: MakeRecipe, corpus_folder: Path, tmp_path: Path
) -> None:
    config, run_folder = recipe(num_steps=6), tmp_path / "run"
    train(config, run_folder, data=corpus_folder, device="cpu", stop=StopAfter(2))
    (whole,) = checkpoint_folders(run_folder)
    with full_disk(20_000), pytest.raises(WriteFailed, match=r"weights\.safetensors: cannot be"):
        train(config, run_folder, data=corpus_folder, device="cpu")
    assert [path for path in run_folder.iterdir() if "checkpoint" in path.name] == [whole]
    assert train(config, run_folder, data=corpus_folder, device="cpu").num_steps == 6
