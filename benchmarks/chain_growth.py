"""Growing and tuning a trained model by a chain, small: Tables 2 and 4.

The base is `chain_settings.py`'s dense model, trained on the standard library without its tests. It
gets a quarter of its heads as a second chain, as {32, 8} in the paper (4.2), and only that chain
trains, on the same text: the base is level 1, untouched, so both figures come from one model. Then
the second chain is tuned to another kind of text, the library's own tests (4.5), whole and by LoRA,
in place of the paper's GLUE: loss on held-out text is what this size can tell apart.
"""

from __future__ import annotations

import argparse
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
from chain_settings import RUNS, SETTINGS, recipe, train_setting
from reporting import Row, save, show

from colm_serve.convert.expand import expand
from colm_serve.model.config import ColmConfig
from colm_serve.training.config import TrainConfig
from colm_serve.training.report import Report, evaluate_folder
from colm_serve.training.trainer import train
from colm_serve.training.tuning import Tuning

NEW_HEADS = 4
LORA_RANK = 8
TESTS = Path(sysconfig.get_path("stdlib")) / "test"


def tuned(folder: Path, config: TrainConfig, data: Path | None) -> Report:
    """Train all chains but the first, unless that has been done; the held-out loss."""
    if (
        not (folder / "model" / "eval.json").exists()
        and not train(config, folder, data=data).finished
    ):
        raise SystemExit("stopped; run it again to go on")
    return Report.load(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=500, help="of chain_settings.py")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine
    base = train_setting(SETTINGS[0], arguments.base_steps) / "model"
    runs = RUNS.parent / "chain_growth" / f"{arguments.base_steps}-{arguments.steps}"
    expanded = runs / "expanded"
    if not expanded.exists():
        runs.mkdir(parents=True, exist_ok=True)
        expand(base, expanded, [NEW_HEADS], kv_sharing="air")
    growth = replace(
        recipe(SETTINGS[0], arguments.steps),
        model=ColmConfig.load(expanded),
        backbone_steps=None,
        peak_lr=1e-3,
        tuning=Tuning(expanded),
    )
    grown = runs / "grown"
    report = tuned(grown, growth, None)
    rows = [
        Row.of(f"Table 2: {name}", [level.heldout_loss], "nats/token", "lower")
        for name, level in zip(("baseline", "+ expansion"), report.levels, strict=True)
    ]

    on_tests = replace(growth, exclude=(), tuning=Tuning(grown / "model"))
    before = evaluate_folder(grown / "model", on_tests, TESTS).levels[-1]
    rows.append(Row.of("Table 4: baseline", [before.heldout_loss], "nats/token", "lower"))
    for name, rank in (("+ LoRA", LORA_RANK), ("+ CT", None)):
        config = replace(on_tests, tuning=Tuning(grown / "model", lora_rank=rank))
        after = tuned(runs / f"tuned_{rank}", config, TESTS).levels[-1]
        rows.append(Row.of(f"Table 4: {name}", [after.heldout_loss], "nats/token", "lower"))
    show("A second chain for a trained model", rows)
    print(f"written to {save('chain_growth', rows)}")


if __name__ == "__main__":
    main()
