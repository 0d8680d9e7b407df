"""The `colm` command, one function each."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from colm_serve.client import Client, Finished, Started, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.convert.expand import expand as expand_model
from colm_serve.convert.export_llama import export_llama as convert_to_llama
from colm_serve.convert.import_llama import import_llama as convert_from_llama
from colm_serve.convert.progress import byte_bar
from colm_serve.demo import run_demo
from colm_serve.errors import ColmError
from colm_serve.measured_costs import measure_costs
from colm_serve.model.config import KvSharing
from colm_serve.pattern_search import patterns_table, write_pattern_file
from colm_serve.simulate.command import run_simulation
from colm_serve.simulate.plots import HAS_MATPLOTLIB, NO_PLOTS
from colm_serve.simulate.report import outcome_table, write_outcome
from colm_serve.training.config import TrainConfig
from colm_serve.training.report import evaluate_folder
from colm_serve.training.trainer import train as run_training

app = typer.Typer(
    help="Serve Chain-of-Language-Models from a prefill/decode disaggregated cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Address = Annotated[str, typer.Option(help="The router's gRPC address.")]
_DATA_HELP = "Text, JSONL or parquet files; default: the standard library's source."
ApiKey = Annotated[
    str | None, typer.Option(envvar="COLM_API_KEY", help="Where the cluster has tenants.")
]


@app.command()
def serve(config: Annotated[Path, typer.Argument(help="A cluster's YAML file.")]) -> None:
    """Run a cluster until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    # Not an event: setting one in a handler deadlocks with the wait that the handler interrupts.
    stop: SimpleQueue[None] = SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.put(None))
    cluster_config = ClusterConfig.load(config)
    with console.status("starting the cluster"):
        cluster = Cluster(cluster_config)
    with cluster:
        names = ", ".join((cluster_config.served_name, *cluster_config.variants))
        console.print(f"serving [bold]{names}[/bold]")
        console.print(f"  gRPC  {cluster.addresses.grpc}")
        console.print(f"  HTTP  http://{cluster.addresses.http}/v1")
        console.print("Ctrl-C stops it")
        stop.get()
        console.print("stopping")


@app.command()
def generate(
    prompt: str,
    address: Address = "127.0.0.1:50051",
    api_key: ApiKey = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to make.")] = None,
    temperature: Annotated[float, typer.Option(help="0 to 2; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal text.")] = None,
    level: Annotated[int | None, typer.Option(help="Exactly this chain level.")] = None,
    sla_class: Annotated[str, typer.Option(help="One of the cluster's SLA classes.")] = "",
) -> None:
    """Stream one continuation."""
    with Client(address, api_key=api_key) as client:
        events = client.generate(
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            level=level,
            sla_class=sla_class,
        )
        for event in events:
            match event:
                case Started():
                    pass
                case Token():
                    print(event.text, end="", flush=True)
                case Finished():
                    print(event.text)
                    usage, timings = event.usage, event.timings
                    summary = (
                        f"{event.reason.value}: {usage.num_prompt_tokens} prompt tokens "
                        f"({usage.num_cached_tokens} cached, {usage.num_shipped_tokens} shipped), "
                        f"{usage.num_output_tokens} made; first after {timings.ttft_s * 1e3:.0f} ms"
                    )
                    print(summary, file=sys.stderr)


@app.command()
def status(address: Address = "127.0.0.1:50051", api_key: ApiKey = None) -> None:
    """Show a running cluster's workers."""
    with Client(address, api_key=api_key) as client:
        state = client.status()
    table = Table(title=f"{state.model}: {state.num_levels} levels")
    for column in (
        "worker",
        "variant",
        "address",
        "reachable",
        "running",
        "waiting",
        "preempted",
        "free pages",
    ):
        table.add_column(column)
    for worker in state.workers:
        table.add_row(
            worker.worker_id,
            worker.variant,
            worker.address,
            "yes" if worker.is_reachable else "[red]no[/red]",
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.num_preemptions),
            f"{worker.num_free_pages} of {worker.num_pages}",
        )
    console.print(table)


@app.command()
def measure(
    out: Annotated[Path, typer.Argument(help="The JSON file to write, for `colm simulate`.")],
    address: Address = "127.0.0.1:50051",
) -> None:
    """Write what a running cluster's workers have measured of their work."""
    measure_costs(address).save(out)
    console.print(f"written to {out}")


@app.command()
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe's YAML file.")],
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run is resumed.")],
    data: Annotated[Path | None, typer.Option(help=_DATA_HELP)] = None,
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


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder that has its train.yaml.")],
    data: Annotated[Path | None, typer.Option(help=_DATA_HELP)] = None,
) -> None:
    """Print the held-out loss of every level."""
    report = evaluate_folder(model, TrainConfig.load(model / "train.yaml"), data)
    console.print(report.table())


@app.command()
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


@app.command()
def import_llama(
    source: Annotated[Path, typer.Argument(help="A Hugging Face LlamaForCausalLM folder.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
) -> None:
    """Make a LLaMA checkpoint a CoLM of one chain, with equal logits."""
    with byte_bar(console, "importing") as report:
        config = convert_from_llama(source, out, report)
    console.print(f"{config.num_params():,} parameters written to {out}")


@app.command()
def export_llama(
    model: Annotated[Path, typer.Argument(help="A model folder of any number of chains.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
) -> None:
    """Write a model's level 1 as a Hugging Face LlamaForCausalLM."""
    with byte_bar(console, "exporting") as report:
        config = convert_to_llama(model, out, report)
    console.print(f"{config.num_params():,} parameters written to {out}")


@app.command()
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


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="A cluster's YAML file.")] = Path(
        "cluster_configs/demo.yaml"
    ),
) -> None:
    """Start the bundled model's cluster, show what chain levels do, stop."""
    logging.basicConfig(level=logging.ERROR)
    run_demo(ClusterConfig.load(config), console)


def main() -> None:
    """Run the command; a ColmError ends it with its message and status 2."""
    try:
        app()
    except ColmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
