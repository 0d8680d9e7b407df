"""A trace played against a simulated cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from colm_serve.simulate.command import run_simulation
from colm_serve.simulate.report import HAS_MATPLOTLIB, NO_PLOTS, outcome_table, write_outcome

console = Console()


def simulate(
    config: Annotated[Path, typer.Argument(help="A cluster's YAML file.")],
    trace: Annotated[
        Path, typer.Argument(help="Mooncake's JSONL, or the YAML of a synthetic trace.")
    ],
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs; default: costs.json beside CONFIG.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="adaptive, aggregated or level-N; default: CONFIG's.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers; default: CONFIG's.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers; default: CONFIG's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another draw of a synthetic trace.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for JSON and plots.")] = None,
) -> None:
    """Play a trace against a cluster on a virtual clock."""
    with console.status("simulating"):
        outcome = run_simulation(
            config,
            trace,
            costs_path=costs,
            policy=policy,
            num_prefill=prefill,
            num_decode=decode,
            seed=seed,
        )
    console.print(outcome_table(outcome))
    if out is not None:
        for path in write_outcome(outcome, out):
            console.print(f"written to {path}")
        if not HAS_MATPLOTLIB:
            console.print(NO_PLOTS)
