"""The `colm` command, one function a subcommand."""

from __future__ import annotations

import sys

import typer

from colm_serve.cli import clusters, models, simulation, training
from colm_serve.errors import ColmError

app = typer.Typer(
    help="Serve Chain-of-Language-Models from a prefill/decode disaggregated cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(clusters.serve)
app.command()(clusters.generate)
app.command()(clusters.status)
app.command()(clusters.measure)
app.command()(simulation.simulate)
app.command()(training.train)
app.command(name="eval")(training.evaluate)
app.command()(models.expand)
app.command()(models.import_llama)
app.command()(models.export_llama)
app.command()(models.seal)
app.command()(models.search_patterns)
app.command()(clusters.demo)


def main() -> None:
    """Run the command; a ColmError ends it with its message and status 2."""
    try:
        app()
    except ColmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
