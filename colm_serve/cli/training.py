"""Models trained, and how well they predict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from colm_serve.training.config import TrainConfig
from colm_serve.training.report import evaluate_folder
from colm_serve.training.trainer import train as run_training

console = Console()

Data = Annotated[
    Path | None,
    typer.Option(
        help="Text, JSONL or parquet files; default: the recipe's stream, or the standard "
        "library's source."
    ),
]


def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe's YAML file.")],
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run is resumed.")],
    data: Data = None,
) -> None:
    """Train a CoLM; Ctrl-C keeps a checkpoint, and the same command goes on from it.

    With N processes: torchrun --nproc-per-node N --local-ranks-filter 0 --no-python colm train ...
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = run_training(TrainConfig.load(recipe), out, data=data)
    if result.model_folder is None:
        console.print(f"stopped after {result.num_steps} steps; run it again to go on")
        raise typer.Exit(130)
    console.print(f"model written to {result.model_folder}")


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder that has its train.yaml.")],
    data: Data = None,
) -> None:
    """Print the held-out loss of every level."""
    report = evaluate_folder(model, TrainConfig.load(model / "train.yaml"), data)
    console.print(report.table())
