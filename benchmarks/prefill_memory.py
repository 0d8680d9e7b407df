"""What a prefill worker keeps in memory: chain 1's weights, the KV in flight and little else.

Each figure is of a process of its own, above one that has prefilled a page with a model of small
width, so that libraries and compiled code are not counted. Resident: anonymous memory of chain 1
of {8,8,8,8}, four layers of LLaMA-3.2-1B's shape, against the bytes of its file and against all
chains. Peak: the small model, so that 128K tokens take seconds, prefills prompts in chunks; the
KV is taken off. A million tokens attend to the first 1,024 and the last 4,096 (A-shape).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from prefill_throughput import DENSE, PAGE_SIZE
from reporting import Row, save, show
from rich.console import Console

from colm_serve.config import PrefillConfig
from colm_serve.engine.loading import load_for_serving, make_pool
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.sparse.selectors import AShape
from colm_serve.engine.sparse.sparsity import SelectedSparsity
from colm_serve.model.chain_file import chain_path
from colm_serve.model.checkpoint import save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel

WIDE = replace(DENSE, chains=(8, 8, 8, 8), tie_embeddings=True)
LENGTHS = (8192, 32768, 131072)
RESIDENT, PEAK = "resident", "peak"
SPARSE_LENGTH = 1024 * 1024
A_SHAPE = AShape(1024, 4096)
SMALL = ColmConfig(
    vocab_size=64, chains=(1, 1), d_model=64, d_ff=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_context=SPARSE_LENGTH,
)  # fmt: skip


def resident_weights(wide: Path, small: Path) -> list[Row]:
    file_mb = chain_path(wide, 1).stat().st_size / 1e6
    base = _measured_mb(RESIDENT, small, 1, PAGE_SIZE)
    chain_1, whole = (
        _measured_mb(RESIDENT, wide, num_chains, PAGE_SIZE) - base
        for num_chains in (1, WIDE.num_chains)
    )
    return [
        Row.of("chain 1's file", [file_mb], "MB", "lower"),
        Row.of("resident, prefill worker", [chain_1], "MB", "lower"),
        Row.of("resident, whole model", [whole], "MB", "lower"),
        Row.of("resident, prefill worker over chain 1's bytes", [chain_1 / file_mb], "x", "lower",
               target=1.1, headline=True),
        Row.of("resident, whole model over prefill worker", [whole / chain_1], "x", "higher",
               headline=True),
    ]  # fmt: skip


def peak_by_length(small: Path) -> list[Row]:
    per_token = 2 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_dim * 4 / 1e6
    base = _measured_mb(PEAK, small, 1, PAGE_SIZE)
    rows, peaks = [], []
    for num_tokens in (*LENGTHS, SPARSE_LENGTH):
        peak = _measured_mb(PEAK, small, 1, num_tokens) - base
        peaks.append(peak - (num_tokens - PAGE_SIZE) * per_token)
        name = f"peak beyond the KV, {num_tokens} tokens"
        rows.append(Row.of(name, [peaks[-1]], "MB", "lower"))
    grown = f"peak beyond the KV, {LENGTHS[-1]} tokens less {LENGTHS[0]}"
    rows.append(
        Row.of(grown, [peaks[-2] - peaks[0]], "MB", "lower", target=4.0, headline=True,
               note=f"the KV itself grows by {(LENGTHS[-1] - LENGTHS[0]) * per_token:.0f} MB")
    )  # fmt: skip
    return rows


def _measured_mb(field: str, folder: Path, num_chains: int, num_tokens: int) -> float:
    arguments = ["--measure", field, str(folder), str(num_chains), str(num_tokens)]
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(field: str, folder: Path, num_chains: int, num_tokens: int) -> None:
    """Load so many chains, prefill so many tokens, print what that took of memory in MB."""
    loaded = load_for_serving(folder, num_chains=num_chains, with_head=num_chains > 1)
    pool = make_pool(loaded, num_tokens // PAGE_SIZE, PAGE_SIZE)
    table = pool.table(range(pool.num_pages))
    chunk_tokens = PrefillConfig().chunk_tokens
    config = loaded.model.config
    selectors = [[A_SHAPE] * config.heads_per_chain[0]] * config.num_layers
    sparsity = SelectedSparsity(selectors, min_tokens=SPARSE_LENGTH)
    run_prefill(loaded.model, pool, [PrefillChunk([0] * PAGE_SIZE, 0, table)])
    # From here on: to compile the kernels takes more memory than they do.
    peaks = [0.0]
    threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
    for start in range(0, num_tokens, chunk_tokens):
        length = min(chunk_tokens, num_tokens - start)
        chunk = PrefillChunk([0] * length, start, table, num_tokens)
        run_prefill(loaded.model, pool, [chunk], sparsity=sparsity)
    # What compiling has freed, one process has reused and the other has not.
    ctypes.CDLL(None).malloc_trim(0)
    print(_memory_mb("RssAnon") if field == RESIDENT else max(peaks[0], _memory_mb("VmRSS")))


def _watch(peaks: list[float]) -> None:
    # Not VmHWM: it knows nothing of what has been swapped out meanwhile.
    while True:
        peaks[0] = max(peaks[0], _memory_mb("VmRSS"))
        time.sleep(0.01)


def _memory_mb(field: str) -> float:
    """A field of this process's status, and what is in swap."""
    status = Path("/proc/self/status").read_text("ascii")
    fields = (line.split() for line in status.splitlines() if line.startswith((field, "VmSwap")))
    return sum(int(kib) for _, kib, _ in fields) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        field, folder, num_chains, num_tokens = arguments.measure
        print_memory(field, Path(folder), int(num_chains), int(num_tokens))
        return
    torch.manual_seed(0)
    with Console().status("measuring memory"), tempfile.TemporaryDirectory() as scratch:
        wide, small = Path(scratch) / "wide", Path(scratch) / "small"
        save_model(ColmModel(WIDE), wide)
        save_model(ColmModel(SMALL), small)
        rows = resident_weights(wide, small) + peak_by_length(small)
    show("Memory of prefill, fp32", rows)
    print(f"written to {save('prefill_memory', rows)}")


if __name__ == "__main__":
    main()
