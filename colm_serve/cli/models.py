"""Model folders made from others, sealed and searched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from colm_serve.convert.expand import expand as expand_model
from colm_serve.convert.export_llama import export_llama as convert_to_llama
from colm_serve.convert.import_llama import import_llama as convert_from_llama
from colm_serve.convert.progress import byte_bar
from colm_serve.model.checkpoint import seal as seal_model
from colm_serve.model.config import KvSharing
from colm_serve.pattern_search import patterns_table, write_pattern_file

console = Console()


def expand(
    model: Annotated[Path, typer.Argument(help="A CoLM folder, such as an imported LLaMA's.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not be there.")],
    add_chains: Annotated[
        list[int], typer.Option(help="Query heads of a new chain; repeat it for more chains.")
    ],
    kv_sharing: Annotated[
        KvSharing | None,
        typer.Option(help="For a model of one chain; default: what it says, air if imported."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
) -> None:
    """Add chains to a model; until they are trained, it says what it said."""
    config = expand_model(model, out, add_chains, kv_sharing=kv_sharing, seed=seed)
    for level in range(1, config.num_chains + 1):
        console.print(f"level {level}: {config.num_params(level):,} parameters")
    console.print(f"written to {out}")


def import_llama(
    source: Annotated[Path, typer.Argument(help="A Hugging Face LlamaForCausalLM folder.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
) -> None:
    """Make a LLaMA checkpoint a CoLM of one chain, with equal logits."""
    with byte_bar(console, "importing") as report:
        config = convert_from_llama(source, out, report)
    console.print(f"{config.num_params():,} parameters written to {out}")


def export_llama(
    model: Annotated[Path, typer.Argument(help="A model folder of any number of chains.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
) -> None:
    """Write a model's level 1 as a Hugging Face LlamaForCausalLM."""
    with byte_bar(console, "exporting") as report:
        config = convert_to_llama(model, out, report)
    console.print(f"{config.num_params():,} parameters written to {out}")


def seal(model: Annotated[Path, typer.Argument(help="A model folder.")]) -> None:
    """Check a model folder's files and write its manifest.

    For folders of earlier versions, which have none, and after a change of config.json by hand.
    """
    config = seal_model(model)
    console.print(f"{config.num_chains} chains checked; manifest written to {model}")


def search_patterns(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Option(help="The pattern file to write, in MInference's format.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text files; default: the standard library's source.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the text to look at.")] = 4096,
    budget: Annotated[float, typer.Option(help="Share of the keys that a head may read.")] = 0.25,
) -> None:
    """Find the sparse attention pattern of each of chain 1's heads, for prefill.sparse."""
    with console.status("searching"):
        layers = write_pattern_file(model, out, data or (), tokens, budget)
    console.print(patterns_table(layers))
    console.print(f"written to {out}")
