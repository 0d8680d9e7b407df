"""What `make demo` shows: every level, chain-1 prefill, a level move, on a real cluster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colm_serve.client import Client, Finished, GenerationEvent, Started, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.engine.loading import load_for_serving, make_pool, to_serving
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.errors import InvalidArgument
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel
from colm_serve.router.request import Usage
from colm_serve.training.report import Report

PROMPT = '''"""Lines of text files."""

import os


def write_lines(path, lines):
    """Write each line and a line end to a text file."""
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\\n")


def read_lines(path):
    """Return the lines of a text file without their line ends."""
'''
_LEVEL_STYLES = ("yellow", "cyan", "green", "magenta", "blue", "red")
_MOVE_EVERY = 12


@dataclass(frozen=True)
class LevelRun:
    """How one level served the prompt."""

    usage: Usage
    ttft_s: float
    tokens_per_s: float


def run_demo(config: ClusterConfig, console: Console) -> None:
    """Start a cluster, show it, stop it.

    Raises:
        ColmError: the cluster does not start, or a request fails.
    """
    model = ColmConfig.load(config.model)
    with console.status("starting Ray, a router, prefill and decode workers"):
        cluster = Cluster(config)
    with cluster, Client(cluster.addresses.grpc) as client:
        show_cluster(client, console)
        show_levels(client, config.model, model, console)
        show_level_move(client, model, console)
        with console.status("stopping the cluster"):
            cluster.stop()
    show_prefill(config.model, model, console)


def show_cluster(client: Client, console: Console) -> None:
    state = client.status()
    workers = ", ".join(f"{worker.worker_id} at {worker.address}" for worker in state.workers)
    console.print(f"[bold]{state.model}[/bold], {state.num_levels} chain levels: {workers}\n")


def show_levels(client: Client, folder: Path, model: ColmConfig, console: Console) -> None:
    """The same prompt at each level, one after another."""
    losses = {row.level: row.heldout_loss for row in Report.load(folder).levels}
    table = Table(title="One set of weights, one KV cache, every size")
    columns = ("level", "active parameters", "prompt KV", "TTFT ms", "tokens/s", "held-out loss")
    for column in columns:
        table.add_column(column, justify="right")
    for _ in client.generate(prompt=f"# warm-up\n{PROMPT}", max_tokens=4, temperature=0):
        pass  # opens connections, touches buffers
    console.print(Text(PROMPT, style="dim"))
    for level in range(1, model.num_chains + 1):
        console.print(f"[bold]level {level}[/bold]")
        run = _run_level(client, level, console)
        table.add_row(
            str(level),
            f"{model.num_params(level):,}",
            f"{run.usage.num_shipped_tokens} shipped, {run.usage.num_cached_tokens} cached",
            f"{run.ttft_s * 1e3:.1f}",
            f"{run.tokens_per_s:.0f}",
            f"{losses[level]:.3f}",
        )
    console.print(table)


def show_level_move(client: Client, model: ColmConfig, console: Console) -> None:
    """One request that is moved up a level every few tokens; K and V are never recomputed."""
    console.print("\n[bold]One request, moved between levels while it runs[/bold]", end=" ")
    console.print(_legend(model.num_chains))
    request_id = ""
    num_tokens, max_tokens = 0, 2 * _MOVE_EVERY * model.num_chains
    line = Text()
    with console.status("generating"):
        for event in _generate(client, 1, max_tokens):
            match event:
                case Started():
                    request_id = event.request_id
                case Token():
                    line.append(event.text, style=_style(event.level))
                    num_tokens += 1
                    if num_tokens % _MOVE_EVERY == 0:
                        level = num_tokens // _MOVE_EVERY % model.num_chains + 1
                        # The cluster may have made the last token before we read this one.
                        with suppress(InvalidArgument):
                            client.set_level(request_id, level)
                case Finished():
                    line.append(event.text)
    console.print(line)


def show_prefill(folder: Path, model: ColmConfig, console: Console) -> None:
    """The same long prompt's prefill: chain 1 against a dense model of the full width."""
    num_tokens = min(2048, model.max_context)
    tokens = [i % model.vocab_size for i in range(num_tokens)]
    dense = replace(
        model, chains=(1,), tie_embeddings=False, head="shared", kv_repeat="tile", vocab_size=1,
    )  # fmt: skip
    torch.set_num_threads(1)
    with console.status("timing prefill"):
        chain_1_s = _prefill_s(load_for_serving(folder, num_chains=1, with_head=False), tokens)
        # Random weights: only the time is of interest. One token id stands for all.
        full = LoadedModel(to_serving(ColmModel(dense, with_head=False)), "")
        dense_s = _prefill_s(full, [0] * num_tokens)
    table = Table(title=f"\nPrefill of {num_tokens} tokens, one thread")
    for column in ("model", "ms", "tokens/s", "speed-up"):
        table.add_column(column, justify="right")
    for name, seconds in (("dense, full width", dense_s), ("chain 1", chain_1_s)):
        table.add_row(
            name,
            f"{seconds * 1e3:.0f}",
            f"{num_tokens / seconds:,.0f}",
            f"{dense_s / seconds:.1f}x",
        )
    console.print(table)


def _run_level(client: Client, level: int, console: Console) -> LevelRun:
    times: list[float] = []
    for event in _generate(client, level, max_tokens=48):
        match event:
            case Token():
                times.append(time.perf_counter())
                console.print(Text(event.text, style=_style(level)), end="")
            case Finished():
                console.print(Text(event.text, style=_style(level)))
                gap_s = statistics.median(b - a for a, b in pairwise(times))
                return LevelRun(event.usage, event.timings.ttft_s, 1 / gap_s)
    raise AssertionError("a generation ends with Finished")


def _generate(client: Client, level: int, max_tokens: int) -> Iterator[GenerationEvent]:
    return client.generate(
        prompt=PROMPT, level=level, max_tokens=max_tokens, temperature=0.7, top_p=0.9, seed=7,
        ignore_eos=True,
    )  # fmt: skip


def _prefill_s(loaded: LoadedModel[ServingModel], tokens: list[int]) -> float:
    page_size = 16
    pool = make_pool(loaded, -(-len(tokens) // page_size), page_size)
    chunk = PrefillChunk(tokens, 0, pool.table(range(pool.num_pages)))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        run_prefill(loaded.model, pool, [chunk])
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _style(level: int) -> str:
    return _LEVEL_STYLES[(level - 1) % len(_LEVEL_STYLES)]


def _legend(num_levels: int) -> Text:
    parts: Iterator[Text] = (
        Text(f"level {level}", style=_style(level)) for level in range(1, num_levels + 1)
    )
    return Text("(") + Text(" ").join(parts) + Text(")")
