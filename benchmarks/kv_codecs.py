"""Smaller keys and values on the wire: bytes, speed, error, and what they cost at each level.

Speed is one thread's, in bytes of fp32 K and V, a frame at a time. Error and cost are the bundled
model's on held-out text: a prompt's K and V pass through the codec as they would from a prefill
worker to a decode worker, then the text that follows is scored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from heldout import MODEL, heldout_windows
from reporting import Row, save, show
from rich.console import Console

from colm_serve.core import KvLayout
from colm_serve.engine.loading import make_pool
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.step import Segment, run_pass
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import load_cpu_model
from colm_serve.transport.codecs import CODECS, Codec

LOSSY = ("bf16", "int8", "fp8")
#: K and V heads of a 1B model; 256 tokens of a layer are a frame of 1 MiB.
WIDE = KvLayout(num_layers=16, num_kv_heads=8, head_dim=64, dtype="float32")
FRAME_TOKENS = 256
#: Frames handled in turn, so that they come out of memory and not out of a cache.
NUM_FRAMES = 32
NUM_PROMPT, NUM_SCORED = 384, 128
PAGE_SIZE = 16


def speed(repeats: int) -> list[Row]:
    """Bytes on the wire, and how fast one thread makes and reads them."""
    torch.set_num_threads(1)
    shape = (NUM_FRAMES, 2, FRAME_TOKENS, WIDE.num_kv_heads, WIDE.head_dim)
    frames, received = torch.randn(shape), torch.empty(shape)
    rows = []
    for name, codec in CODECS.items():
        payloads = [b"".join(codec.encode(k, v)) for k, v in frames]
        ratio = len(payloads[0]) / frames[0].nbytes
        rows.append(Row.of(f"{name}: bytes over raw's", [ratio], "x", "lower"))
        for what, run in (
            ("encoded", partial(encode, codec, frames)),
            ("decoded", partial(decode, codec, payloads, received)),
        ):
            speeds = [frames.nbytes / 1e9 / seconds(run) for _ in range(repeats)]
            rows.append(Row.of(f"{name}: fp32 K and V {what}", speeds, "GB/s", "higher"))
    return rows


def encode(codec: Codec, frames: torch.Tensor) -> None:
    for k, v in frames:
        b"".join(codec.encode(k, v))


def decode(codec: Codec, payloads: list[bytes], received: torch.Tensor) -> None:
    for frame, payload in zip(received, payloads, strict=True):
        frame[0], frame[1] = codec.decode(memoryview(payload), WIDE, FRAME_TOKENS)


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Prompts:
    """The bundled model, windows of held-out text, and their first tokens' exact K and V."""

    def __init__(self, num_windows: int) -> None:
        self.loaded = load_cpu_model(MODEL)
        self._windows = heldout_windows(num_windows, NUM_PROMPT + NUM_SCORED)
        num_pages = (NUM_PROMPT + NUM_SCORED) // PAGE_SIZE
        self._pool = make_pool(self.loaded, num_pages, PAGE_SIZE)
        self._table = self._pool.table(range(num_pages))
        self._exact = [self._prefill(window[:NUM_PROMPT]) for window in self._windows]

    @property
    def num_levels(self) -> int:
        return self.loaded.model.num_chains

    def errors(self, codec: Codec) -> dict[str, tuple[float, float]]:
        """Mean and largest error of K and of V, each over the mean of what it should be."""
        errors = {}
        for index, kind in enumerate("KV"):
            exact = torch.stack([kv[:, index] for kv in self._exact])
            passed = torch.stack([self._passed(kv, codec)[:, index] for kv in self._exact])
            error, mean = (passed - exact).abs(), exact.abs().mean()
            errors[kind] = (float(error.mean() / mean), float(error.max() / mean))
        return errors

    def losses(self, codec: Codec) -> list[list[float]]:
        """Nats a token of the text after each prompt, by level and window."""
        losses: list[list[float]] = [[] for _ in range(self.num_levels)]
        for window, exact in zip(self._windows, self._exact, strict=True):
            for layer, (k, v) in enumerate(self._passed(exact, codec)):
                self._pool.write(layer, self._table, 0, k, v)
            for level, of_level in enumerate(losses, start=1):
                segment = Segment(window[NUM_PROMPT:-1], NUM_PROMPT, level, self._table, NUM_SCORED)
                logits_SV = run_pass(self.loaded.model, self._pool, [segment]).logits_SV
                expected = torch.tensor(window[NUM_PROMPT + 1 :])
                of_level.append(F.cross_entropy(logits_SV, expected).item())
        return losses

    def _prefill(self, prompt: list[int]) -> torch.Tensor:
        """[layers, K and V, tokens, heads, head dim]"""
        run_prefill(self.loaded.model, self._pool, [PrefillChunk(prompt, 0, self._table)])
        return torch.stack([self._read(self._pool, layer) for layer in range(self._num_layers)])

    def _read(self, pool: KvPool, layer: int) -> torch.Tensor:
        return torch.stack(pool.read(layer, self._table, 0, NUM_PROMPT))

    def _passed(self, kv: torch.Tensor, codec: Codec) -> torch.Tensor:
        """What arrives of it, sent layer by layer."""
        layout = self._pool.layout
        layers = []
        for k, v in kv:
            payload = b"".join(codec.encode(k, v))
            layers.append(torch.stack(codec.decode(memoryview(payload), layout, NUM_PROMPT)))
        return torch.stack(layers).to(kv.dtype)

    @property
    def _num_layers(self) -> int:
        return self._pool.layout.num_layers


def cost(num_windows: int) -> list[Row]:
    """Errors of the model's own K and V, and held-out loss of each level above raw's."""
    prompts = Prompts(num_windows)
    exact = prompts.losses(CODECS["raw"])
    rows = []
    for name in LOSSY:
        for kind, (mean, largest) in prompts.errors(CODECS[name]).items():
            rows.append(Row.of(f"{name}: mean error of {kind}, over its mean", [mean], "", "lower"))
            row = Row.of(f"{name}: largest error of {kind}, over its mean", [largest], "", "lower")
            rows.append(row)
        for level, (of_codec, of_raw) in enumerate(
            zip(prompts.losses(CODECS[name]), exact, strict=True), start=1
        ):
            spread = [a - b for a, b in zip(of_codec, of_raw, strict=True)]
            mean_raw = sum(of_raw) / len(of_raw)
            case = f"{name}: loss at level {level} above {mean_raw:.3f}"
            row = Row.of(
                case, [sum(spread) / len(spread)], "nats", "lower", headline=level == len(exact)
            )
            rows.append(replace(row, spread=(min(spread), max(spread))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with Console().status("passing keys and values through codecs"):
        rows = speed(arguments.repeats) + cost(arguments.windows)
    show("Keys and values of fewer bits on the wire", rows)
    print(f"written to {save('kv_codecs', rows)}")


if __name__ == "__main__":
    main()
