"""Two processes under torchrun train as one does, and each goes on from where the other ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.errors import InvalidConfig
from colm_serve.model.checkpoint import load_model
from colm_serve.training.config import TrainConfig
from colm_serve.training.data_parallel import DataParallel
from colm_serve.training.snapshot import checkpoint_folders
from colm_serve.training.stream_config import StreamConfig
from colm_serve.training.trainer import train
from tests.training.runs import MODEL, StopAfter, losses

MakeRecipe = Callable[..., TrainConfig]
UNTIED = replace(MODEL, tie_embeddings=False)

#: Each process that torchrun starts runs this.
_SCRIPT = """
import json, sys, torch
from pathlib import Path
from colm_serve.training.config import TrainConfig
from colm_serve.training.trainer import train
from tests.training.runs import StopAfter
torch.set_num_threads(1)
# Otherwise each run makes a group of its own, which torchrun's store allows once.
torch.distributed.init_process_group("gloo")
for raw, folder, data, num_steps in json.loads(sys.argv[1]):
    config, data = TrainConfig.from_dict(raw), data and Path(data)
    train(config, Path(folder), data=data, device="cpu", stop=StopAfter(num_steps))
torch.distributed.destroy_process_group()
"""


Run = tuple[TrainConfig, Path, Path | None, int]


def run_two_processes(folder: Path, runs: list[Run]) -> None:
    """Each run is a recipe, a folder, a corpus and after how many steps to stop."""
    script = folder / "train.py"
    script.write_text(_SCRIPT, "utf-8")
    plain = [(c.to_dict(), str(out), data and str(data), steps) for c, out, data, steps in runs]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    process = subprocess.Popen(
        [*launcher, str(script), json.dumps(plain)], env={**os.environ, **environment}
    )
    try:
        assert process.wait(timeout=100) == 0
    finally:
        process.terminate()  # torchrun then ends its processes
        process.wait(timeout=60)


def test_two_processes_train_as_one(
    recipe: MakeRecipe, corpus_folder: Path, rows_folder: Path, tmp_path: Path
) -> None:
    """From a folder, and from a stream of which each reads its own files."""
    config = recipe(
        model=UNTIED,
        num_steps=5,
        backbone_steps=3,
        warmup_steps=1,
        eval_interval_steps=2,
        recompute_activations=True,
    )
    train(config, tmp_path / "one", data=corpus_folder, device="cpu")
    train(config, tmp_path / "one-then-two", data=corpus_folder, device="cpu", stop=StopAfter(4))
    stream = StreamConfig(str(rows_folder), shuffle_sequences=3)
    streaming = replace(config, backbone_steps=None, stream=stream)
    train(streaming, tmp_path / "streamed-by-one", device="cpu")
    run_two_processes(
        tmp_path,
        [
            (config, tmp_path / "two", corpus_folder, 100),
            (config, tmp_path / "two-then-one", corpus_folder, 2),
            (config, tmp_path / "one-then-two", corpus_folder, 100),
            (streaming, tmp_path / "streamed", None, 3),
        ],
    )
    assert len(losses(tmp_path / "two-then-one")) == 2
    train(config, tmp_path / "two-then-one", data=corpus_folder, device="cpu")

    expected = load_model(tmp_path / "one" / "model").model
    for name in ("two", "two-then-one", "one-then-two"):
        run = tmp_path / name
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        for key, weight in load_model(run / "model").model.named_parameters():
            torch.testing.assert_close(weight, expected.get_parameter(key), atol=1e-5, rtol=1e-5)
    (checkpoint,) = checkpoint_folders(tmp_path / "streamed")
    assert json.loads((checkpoint / "state.json").read_text("utf-8"))["batches"].keys() == {
        "0",
        "1",
    }
    train(streaming, tmp_path / "streamed", device="cpu")
    by_one = losses(tmp_path / "streamed-by-one")
    assert losses(tmp_path / "streamed") == pytest.approx(by_one, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("sequences_per_step", {"sequences_per_step": 6}),
        ("lower_levels", {"model": replace(UNTIED, head="per_level"), "lower_levels": 1}),
    ],
)
def test_work_that_two_cannot_share_is_refused(
    recipe: MakeRecipe, key: str, changes: dict[str, object]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        DataParallel(torch.device("cpu"), num_processes=2).check_shares(recipe(**changes))
    assert caught.value.key == key
