"""Clusters: start one, call it, look at it."""

from __future__ import annotations

import logging
import signal
import sys
from datetime import datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from colm_serve.client import Client, Finished, Started, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.demo import run_demo
from colm_serve.errors import Unavailable
from colm_serve.measured_costs import measure_costs

console = Console()
#: How often `serve` asks what the cluster has done.
_NEWS_INTERVAL_S = 1.0

Address = Annotated[str, typer.Option(help="The router's gRPC address.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="COLM_API_KEY", help="Where the cluster has tenants.")
]


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
        trouble = ""
        while not _is_told(stop):
            trouble = _print_news(cluster, trouble)
        console.print("stopping")


def _is_told(stop: SimpleQueue[None]) -> bool:
    try:
        stop.get(timeout=_NEWS_INTERVAL_S)
    except Empty:
        return False
    return True


def _print_news(cluster: Cluster, trouble: str) -> str:
    """Print what is new; returns why nothing can be, if so, which is printed once."""
    try:
        lines, now = cluster.news(), ""
    except Unavailable as error:
        now = str(error).splitlines()[0]
        lines = () if now == trouble else (now,)
    for line in lines:
        console.print(f"{datetime.now():%H:%M:%S} {line}", highlight=False, markup=False)
    return now


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


def measure(
    out: Annotated[Path, typer.Argument(help="The JSON file to write, for `colm simulate`.")],
    address: Address = "127.0.0.1:50051",
) -> None:
    """Write what a running cluster's workers have measured of their work."""
    measure_costs(address).save(out)
    console.print(f"written to {out}")


def demo(
    config: Annotated[Path, typer.Option(help="A cluster's YAML file.")] = Path(
        "cluster_configs/demo.yaml"
    ),
) -> None:
    """Start the bundled model's cluster, show what chain levels do, stop."""
    logging.basicConfig(level=logging.ERROR)
    run_demo(ClusterConfig.load(config), console)
