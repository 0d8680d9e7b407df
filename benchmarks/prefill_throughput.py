"""Chain-1 prefill against the dense model of the same configuration, in one run.

The paper's claim is that a CoLM-Air prefill computes chain 1 alone (4.4, Table 10). Here both
sides run on our own engine with random weights, the dense one being CoLM with one chain, so the
only difference is the chain: the speed-up is set beside the ratio of the floating-point
operations, which is what it could reach. Layers have the shape of LLaMA-3.2-1B; there are four,
and on both sides the last stops after K and V.

Peak memory: a process that opens chain 1's file alone against one that opens all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from reporting import Row, save, show
from rich.console import Console

from colm_serve.engine.loading import load_for_serving, make_pool, to_serving
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.model.checkpoint import LoadedModel, chain_path, save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel

DENSE = ColmConfig(
    vocab_size=32000, chains=(32,), d_model=2048, d_ff=8192, num_layers=4, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=8192,
)  # fmt: skip
CHAINS = {"{16,16}": (16, 16), "{8,8,8,8}": (8, 8, 8, 8)}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
#: Share of the FLOP ratio to reach at 2,048 tokens.
TARGETS = {"{16,16}": 0.85, "{8,8,8,8}": 0.7}
#: Table 10 at 2K and 4K tokens, on a GPU where 2K is launch-bound.
PAPER_SPEED_UP = {("{16,16}", 2048): 1.09, ("{16,16}", 4096): 1.30,
                  ("{8,8,8,8}", 2048): 1.06, ("{8,8,8,8}", 4096): 1.24}  # fmt: skip
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

    def __init__(self, config: ColmConfig) -> None:
        # The embedding is a look-up: one row stands for all, and memory stays small.
        small = replace(config, vocab_size=1)
        loaded = LoadedModel(to_serving(ColmModel(small, num_chains=1, with_head=False)), "")
        self._model = loaded.model
        self._pool = make_pool(loaded, max(LENGTHS) // PAGE_SIZE, PAGE_SIZE)
        self._table = self._pool.table(range(self._pool.num_pages))

    def seconds(self, num_tokens: int) -> float:
        chunk = PrefillChunk([0] * num_tokens, 0, self._table)
        begin = time.perf_counter()
        run_prefill(self._model, self._pool, [chunk])
        return time.perf_counter() - begin


def compare(
    name: str, chains: tuple[int, ...], lengths: tuple[int, ...], repeats: int
) -> list[Row]:
    """Time dense and chain 1 in turn; the ratio is taken pair by pair."""
    config = replace(DENSE, chains=chains)
    dense, chain_1 = Prefiller(DENSE), Prefiller(config)
    rows = []
    for num_tokens in lengths:
        dense.seconds(num_tokens), chain_1.seconds(num_tokens)
        pairs = [(dense.seconds(num_tokens), chain_1.seconds(num_tokens)) for _ in range(repeats)]
        flop_ratio = prefill_flops(DENSE, num_tokens) / prefill_flops(config, num_tokens)
        speed_ups = [a / b for a, b in pairs]
        shares = [s / flop_ratio for s in speed_ups]
        case = f"{name} {num_tokens} tokens"
        rows += [
            Row.of(f"{case}: dense", [a * 1e3 for a, _ in pairs], "ms", "lower"),
            Row.of(f"{case}: chain 1", [b * 1e3 for _, b in pairs], "ms", "lower"),
            Row.of(f"{case}: speed-up", speed_ups, "x", "higher",
                   note=_paper_note(name, num_tokens), headline=num_tokens >= 2048),
            Row.of(f"{case}: share of the FLOP ratio {flop_ratio:.2f}", shares, "", "higher",
                 target=TARGETS[name] if num_tokens == 2048 else None,
                 headline=num_tokens == 2048),
        ]  # fmt: skip
    return rows


def compare_memory(num_tokens: int) -> list[Row]:
    """Peak resident memory of a chain-1 process and of a whole-model process, {8,8,8,8}."""
    config = replace(DENSE, chains=CHAINS["{8,8,8,8}"], tie_embeddings=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(ColmModel(config), folder)
        weights_mb = chain_path(folder, 1).stat().st_size / 1e6
        base = _peak_mb(folder, 0, num_tokens)
        chain_1 = _peak_mb(folder, 1, num_tokens) - base
        whole = _peak_mb(folder, config.num_chains, num_tokens) - base
    return [
        Row.of("chain 1's file", [weights_mb], "MB", "lower"),
        Row.of("peak memory, prefill worker", [chain_1], "MB", "lower",
             note="above a process that has imported the same code and opened nothing"),
        Row.of("peak memory, whole model", [whole], "MB", "lower"),
        Row.of("peak memory, whole model over prefill worker", [whole / chain_1], "x", "higher",
             headline=True),
    ]  # fmt: skip


def _peak_mb(folder: Path, num_chains: int, num_tokens: int) -> float:
    command = [sys.executable, __file__, "--peak-of", str(folder), str(num_chains), str(num_tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(folder: Path, num_chains: int, num_tokens: int) -> None:
    """Prefill once in this process and print its peak resident memory in MB."""
    if num_chains:
        is_prefill_worker = num_chains == 1
        loaded = load_for_serving(folder, num_chains=num_chains, with_head=not is_prefill_worker)
        pool = make_pool(loaded, num_tokens // PAGE_SIZE, PAGE_SIZE)
        chunk = PrefillChunk([0] * num_tokens, 0, pool.table(range(pool.num_pages)))
        run_prefill(loaded.model, pool, [chunk])
    # Not getrusage: its maximum survives exec, so a child would report its parent's.
    status = Path("/proc/self/status").read_text("ascii")
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak_kib) * 1024 / 1e6)


def _paper_note(name: str, num_tokens: int) -> str:
    paper = PAPER_SPEED_UP.get((name, num_tokens))
    return "" if paper is None else f"the paper's Table 10: {paper}x, 16 layers on an A100"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        folder, num_chains, num_tokens = arguments.peak_of
        print_peak(Path(folder), int(num_chains), int(num_tokens))
        return
    torch.manual_seed(0)
    rows: list[Row] = []
    with Console().status("timing prefill"):
        for name, chains in CHAINS.items():
            rows += compare(name, chains, tuple(arguments.lengths), arguments.repeats)
        rows += compare_memory(num_tokens=2048)
    show("Prefill: chain 1 against dense, layers of LLaMA-3.2-1B's shape, fp32", rows)
    print(f"written to {save('prefill_throughput', rows)}")


if __name__ == "__main__":
    main()
