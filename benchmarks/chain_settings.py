"""The paper's chain settings trained alike, small: Tables 1 and 3, Figure 6.

Every model learns from the same tokens in the same order, in the paper's two stages (3.4): the
backbone on the top level's loss, then the heads of all levels. What is compared is the loss on
held-out text; the paper's tasks would measure noise at this size. Head counts are half the paper's
and widths a sixteenth, so each setting keeps its proportions ({16,16} is {8,8} here), and the wider
variants have about the baseline's parameter count, as theirs have.

A finished setting is not trained again: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from reporting import Row, save, show

from colm_serve.model.config import ColmConfig, KvSharing
from colm_serve.training.config import TrainConfig
from colm_serve.training.metrics import read_metrics
from colm_serve.training.report import Report
from colm_serve.training.trainer import train

RUNS = Path("runs/chain_settings")
BASELINE = ColmConfig(
    vocab_size=1024, chains=(16,), d_model=128, d_ff=512, num_layers=4, num_heads=16,
    num_kv_heads=4, head_dim=8, max_context=128, kv_sharing="per_chain",
)  # fmt: skip
EXCLUDED = ("encodings/*", "lib2to3/tests/data/*", "pydoc_data/*", "test/*", "idlelib/*")
_TOKENS = ("tokenizer.json", "tokenizer_config.json", "train.npy", "heldout.npy")
#: Loss curves are read here: means over so many steps.
CURVE_WINDOW = 20


@dataclass(frozen=True)
class Setting:
    """A model of the paper by its own name, with its proportions at our width."""

    name: str
    chains: tuple[int, ...]
    head_dim: int
    kv_sharing: KvSharing
    joint: bool = False

    @property
    def folder(self) -> str:
        chains = "-".join(map(str, self.chains))
        return f"{self.kv_sharing}_{chains}_{self.head_dim}{'_joint' * self.joint}"

    @property
    def model(self) -> ColmConfig:
        return replace(
            BASELINE,
            chains=self.chains,
            d_model=BASELINE.num_heads * self.head_dim,
            head_dim=self.head_dim,
            kv_sharing=self.kv_sharing,
        )


SETTINGS = (
    Setting("{32}, 2048", (16,), 8, "per_chain"),
    Setting("CoLM {16,16}, 2560", (8, 8), 10, "per_chain"),
    Setting("CoLM {16,16}, 2048", (8, 8), 8, "per_chain"),
    Setting("CoLM {8,8,8,8}, 3072", (4, 4, 4, 4), 12, "per_chain"),
    Setting("CoLM {8,8,8,8}, 2048", (4, 4, 4, 4), 8, "per_chain"),
    Setting("CoLM-Air {16,16}, 2560", (8, 8), 10, "air"),
    Setting("CoLM-Air {16,16}, 2048", (8, 8), 8, "air"),
    Setting("CoLM-Air {8,8,8,8}, 3072", (4, 4, 4, 4), 12, "air"),
    Setting("CoLM-Air {8,8,8,8}, 2048", (4, 4, 4, 4), 8, "air"),
    Setting("CoLM {8,24}, 2048", (4, 12), 8, "per_chain"),
    Setting("CoLM {8,8,16}, 2048", (4, 4, 8), 8, "per_chain"),
    Setting("CoLM {8,8,8,8}, 2048, all levels at once", (4, 4, 4, 4), 8, "per_chain", joint=True),
)


def recipe(setting: Setting, num_steps: int) -> TrainConfig:
    """The same for all settings but for the model; a fifth of the steps trains the heads."""
    return TrainConfig(
        model=setting.model,
        num_steps=num_steps,
        backbone_steps=None if setting.joint else num_steps * 4 // 5,
        seed=1,
        seq_len=128,
        sequences_per_step=8,
        sequences_per_micro_batch=8,
        peak_lr=3e-3,
        warmup_steps=num_steps // 20,
        precision="fp32",
        exclude=EXCLUDED,
        eval_interval_steps=num_steps,
        checkpoint_interval_s=60,
    )


def train_setting(setting: Setting, num_steps: int) -> Path:
    """Train, unless that has been done; the run's folder."""
    folder = RUNS / str(num_steps) / setting.folder
    if (folder / "model" / "eval.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    first = folder.parent / SETTINGS[0].folder
    if folder != first:
        # Every run has the same tokens; the file that says so comes last.
        for name in (*_TOKENS, "dataset.json"):
            shutil.copy(first / name, folder)
    if not train(recipe(setting, num_steps), folder).finished:
        raise SystemExit("stopped; run it again to go on")
    return folder


def rows_of(setting: Setting, folder: Path) -> list[Row]:
    """Size and held-out loss of every level, and the course of the training loss."""
    rows = []
    report = Report.load(folder / "model")
    for level in report.levels:
        name = f"{setting.name}: level {level.level}, {level.active_params / 1e6:.2f}M"
        rows.append(Row.of(name, [level.heldout_loss], "nats/token", "lower"))
    rows += _curve(setting, folder)
    return rows


def _curve(setting: Setting, folder: Path) -> list[Row]:
    """Mean training loss of the first stage at its quarters."""
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    config = TrainConfig.load(folder / "model" / "train.yaml")
    num_steps = config.backbone_steps or config.num_steps
    rows = []
    for quarter in (1, 2, 3, 4):
        end = num_steps * quarter // 4
        window = losses[end - CURVE_WINDOW : end]
        name = f"{setting.name}: training loss up to step {end}"
        rows.append(Row.of(name, [sum(window) / len(window)], "nats/token", "lower"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine
    rows = []
    for setting in SETTINGS:
        rows += rows_of(setting, train_setting(setting, arguments.steps))
    show("Chain settings on the standard library's source", rows)
    print(f"written to {save('chain_settings', rows)}")


if __name__ == "__main__":
    main()
