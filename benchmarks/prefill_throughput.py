"""Chain-1 prefill against the dense model of the same configuration, in one run.

The paper's claim is that a CoLM-Air prefill computes chain 1 alone (4.4, Table 10). Here both
sides run on our own engine with random weights, the dense one being CoLM with one chain, so the
only difference is the chain: the speed-up is set beside the ratio of the floating-point
operations, which is what it could reach. Layers have the shape of LLaMA-3.2-1B; there are four,
and on both sides the last stops after K and V. Prompts are computed in chunks, as workers do.

{8,8,8,8}, {8,8,16} and {8,24} have the same chain 1, so it is timed once for the three. Prompts
beyond 4,096 tokens are timed once and unwarmed: at 32,768 the dense one takes minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from reporting import Row, save, show
from rich.console import Console
from rich.table import Table

from colm_serve.config import PrefillConfig
from colm_serve.engine.loading import make_pool, to_serving
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
#: The longest prompt that is warmed up and repeated.
REPEATED = 4096
DENSE = ColmConfig(
    vocab_size=32000, chains=(32,), d_model=2048, d_ff=8192, num_layers=4, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=max(LENGTHS),
)  # fmt: skip
SAME_CHAIN_1 = "{8,8,8,8}, {8,8,16}, {8,24}"
CHAINS = {"{16,16}": (16, 16), SAME_CHAIN_1: (8, 8, 8, 8)}
#: Share of the FLOP ratio to reach.
TARGETS = {"{16,16}": 0.9, SAME_CHAIN_1: 0.8}
#: The paper's Table 10, same configuration: ms by length, 16 layers on an A100.
PAPER_LENGTHS = (2048, 4096, 8192, 16384, 32768)
PAPER_MS = {
    "dense": (51.0, 62.0, 132.0, 313.0, 997.0),
    "{16,16}": (47.0, 47.6, 60.0, 140.0, 380.0),
    SAME_CHAIN_1: (48.0, 50.0, 51.0, 71.0, 193.0),
}
PAGE_SIZE = 16


def prefill_flops(config: ColmConfig, num_tokens: int) -> float:
    """Multiply-adds, twice, of chain 1 over a prompt; causal attention counts its lower half."""
    d, ff = config.chain_dims[0], config.chain_ff_dims[0]
    q, kv = config.heads_per_chain[0] * config.head_dim, config.num_kv_heads * config.head_dim
    kv_only = 2 * d * kv
    whole = kv_only + 2 * d * q + 3 * d * ff + num_tokens * q
    return 2.0 * num_tokens * ((config.num_layers - 1) * whole + kv_only)


class Prefiller:
    """A random-weight chain 1, ready to be timed."""

    def __init__(self, config: ColmConfig, max_tokens: int, chunk_tokens: int) -> None:
        # The embedding is a look-up: one row stands for all, and memory stays small.
        small = replace(config, vocab_size=1)
        loaded = LoadedModel(to_serving(ColmModel(small, num_chains=1, with_head=False)), "")
        self._model = loaded.model
        self._pool = make_pool(loaded, -(-max_tokens // PAGE_SIZE), PAGE_SIZE)
        self._table = self._pool.table(range(self._pool.num_pages))
        self._chunk_tokens = chunk_tokens

    def seconds(self, num_tokens: int) -> float:
        begin = time.perf_counter()
        for start in range(0, num_tokens, self._chunk_tokens):
            length = min(self._chunk_tokens, num_tokens - start)
            run_prefill(self._model, self._pool, [PrefillChunk([0] * length, start, self._table)])
        return time.perf_counter() - begin


def compare(lengths: Sequence[int], chunk_tokens: int, repeats: int) -> dict[int, list[Row]]:
    """By length: dense and each chain 1 timed in turn; ratios are taken run by run."""
    configs = {name: replace(DENSE, chains=chains) for name, chains in CHAINS.items()}
    sides = {
        name: Prefiller(config, max(lengths), chunk_tokens)
        for name, config in {"dense": DENSE, **configs}.items()
    }
    rows = {}
    for num_tokens in lengths:
        if num_tokens <= REPEATED:
            for side in sides.values():
                side.seconds(num_tokens)
        runs: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats if num_tokens <= REPEATED else 1):
            for name, side in sides.items():
                runs[name].append(side.seconds(num_tokens))
        rows[num_tokens] = _rows_of(num_tokens, runs, configs)
    return rows


def _rows_of(
    num_tokens: int, runs: Mapping[str, Sequence[float]], configs: Mapping[str, ColmConfig]
) -> list[Row]:
    rows = [
        Row.of(f"{name}, {num_tokens} tokens", [s * 1e3 for s in seconds], "ms", "lower")
        for name, seconds in runs.items()
    ]
    flops = prefill_flops(DENSE, num_tokens)
    rates = [flops / s / 1e9 for s in runs["dense"]]
    rows.append(Row.of(f"dense, {num_tokens} tokens: rate", rates, "GFLOP/s", "higher"))
    for name, config in configs.items():
        flop_ratio = flops / prefill_flops(config, num_tokens)
        speed_ups = [a / b for a, b in zip(runs["dense"], runs[name], strict=True)]
        paper = _paper_speed_up(name, num_tokens)
        note = "" if paper is None else f"the paper's Table 10: {paper:.2f}x"
        rows += [
            Row.of(f"{name}, {num_tokens} tokens: speed-up", speed_ups, "x", "higher", note=note,
                   headline=paper is not None),
            Row.of(f"{name}, {num_tokens} tokens: share of the FLOP ratio {flop_ratio:.2f}",
                   [s / flop_ratio for s in speed_ups], "", "higher", target=TARGETS[name],
                   headline=True),
        ]  # fmt: skip
    return rows


def _paper_speed_up(name: str, num_tokens: int) -> float | None:
    if num_tokens not in PAPER_LENGTHS:
        return None
    at = PAPER_LENGTHS.index(num_tokens)
    return PAPER_MS["dense"][at] / PAPER_MS[name][at]


def show_table_10(rows: Mapping[int, Sequence[Row]]) -> None:
    """The paper's layout: a line a method, a column a length, theirs beside ours."""
    table = Table(title="Table 10, same configuration: ms (speed-up over dense)")
    for column in ("", "layers", *(f"{num_tokens}" for num_tokens in rows)):
        table.add_column(column, justify="right" if column else "left")
    for name in PAPER_MS:
        ours = []
        for num_tokens, of_length in rows.items():
            values = {row.name: row.value for row in of_length}
            case = f"{name}, {num_tokens} tokens"
            speed_up = values.get(f"{case}: speed-up", 1.0)
            ours.append(f"{values[case]:.0f} ({speed_up:.2f}x)")
        table.add_row(f"{name}, here", f"{DENSE.num_layers}", *ours)
    for name, times in PAPER_MS.items():
        theirs = []
        for num_tokens in rows:
            if num_tokens in PAPER_LENGTHS:
                at = PAPER_LENGTHS.index(num_tokens)
                theirs.append(f"{times[at]:g} ({PAPER_MS['dense'][at] / times[at]:.2f}x)")
            else:
                theirs.append("")
        of_paper = "{8,8,8,8}" if name == SAME_CHAIN_1 else name
        table.add_row(f"{of_paper}, the paper", "16", *theirs)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--chunk-tokens", type=int, default=PrefillConfig().chunk_tokens)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with Console().status("timing prefill"):
        by_length = compare(arguments.lengths, arguments.chunk_tokens, arguments.repeats)
    rows = [row for of_length in by_length.values() for row in of_length]
    show("Prefill: chain 1 against dense, layers of LLaMA-3.2-1B's shape, fp32", rows)
    show_table_10(by_length)
    print(f"written to {save('prefill_throughput', rows)}")


if __name__ == "__main__":
    main()
