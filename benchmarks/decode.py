"""Decode steps against the memory's speed, and against transformers on the same weights.

A decode step of few rows reads every active weight once, so its floor is the bytes of the level's
weights and of the rows' KV over the machine's read bandwidth, which is measured in the same run.
Random weights, fp32, width 2048, 8 layers, 32,000 tokens of vocabulary.
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import psutil
import torch
from reporting import Row, save, show
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from colm_serve.config import DecodeConfig
from colm_serve.core import DecodeRequest, FinishReason, SamplingParams
from colm_serve.decode_worker.scheduler import DecodeScheduler
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine.loading import make_pool, to_serving
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.sampler import Run, sample
from colm_serve.engine.step import Segment, run_pass
from colm_serve.kv.ledger import PageLedger
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel

CHAINED = ColmConfig(
    vocab_size=32000, chains=(8, 8, 8, 8), d_model=2048, d_ff=8192, num_layers=8, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=4096,
)  # fmt: skip
DENSE = replace(CHAINED, chains=(32,))
GREEDY = SamplingParams(max_tokens=1, temperature=0)
CACHED_TOKENS = 128
PAGE_SIZE = 16
MAX_ROWS = 8
_WHY_NOT_MORE = "of {:.0f} GB/s; beside the weights: cold caches after them, Python, attention"


class Stepper:
    """A model, of random weights by default, and a pool with room for `MAX_ROWS` rows."""

    def __init__(self, config: ColmConfig, model: ServingModel | None = None) -> None:
        self.config = config
        self.model = to_serving(ColmModel(config)) if model is None else model
        pages = -(-(CACHED_TOKENS + 1) // PAGE_SIZE)
        self._pool = make_pool(LoadedModel(self.model, ""), MAX_ROWS * pages, PAGE_SIZE)
        self._tables = [
            self._pool.table(range(i * pages, (i + 1) * pages)) for i in range(MAX_ROWS)
        ]

    def step(self, levels: Sequence[int]) -> None:
        """One step of a row at each of these levels, highest first."""
        rows = [
            Segment((1,), CACHED_TOKENS, level, table)
            for level, table in zip(levels, self._tables, strict=False)
        ]
        scores = run_pass(self.model, self._pool, rows)
        sample(scores.logits_SV, [Run(GREEDY, CACHED_TOKENS + 1)] * len(rows))

    def fill_cache(self) -> None:
        """Compute the cached tokens' keys and values, all of token 1, for every row."""
        for table in self._tables:
            chunk = PrefillChunk([1] * CACHED_TOKENS, 0, table)
            run_prefill(self.model, self._pool, [chunk])

    def num_bytes(self, level: int, num_rows: int) -> int:
        """What a step has to read: the level's weights once, each row's KV."""
        config = self.config
        num_embedding = config.vocab_size * config.level_dims[level - 1]
        num_weights = config.num_params(level) - num_embedding
        num_kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * CACHED_TOKENS
        return 4 * (num_weights + num_rows * num_kv)


def measure(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def read_bandwidth(repeats: int) -> float:
    """Bytes a second of a sum over 1 GiB: faster here than any library's matrix-vector product."""
    values = torch.ones(2**28)
    return values.numel() * 4 / min(measure(values.sum, repeats))


def against_roofline(chained: Stepper, repeats: int) -> list[Row]:
    """Batch 1 at each level, between two measurements of the bandwidth."""
    rows = []
    for level in range(1, CHAINED.num_chains + 1):
        bandwidth = read_bandwidth(3)
        seconds = measure(partial(chained.step, [level]), repeats)
        bandwidth = max(bandwidth, read_bandwidth(3))
        floor_s = chained.num_bytes(level, 1) / bandwidth
        shares = [floor_s / s for s in seconds]
        rows += [
            Row.of(f"level {level}, 1 row: step", [s * 1e3 for s in seconds], "ms", "lower"),
            Row.of(f"level {level}, 1 row: share of the roofline", shares, "", "higher",
                   target=0.85, headline=True, note=_WHY_NOT_MORE.format(bandwidth / 1e9)),
        ]  # fmt: skip
    return rows


def mixed_levels(chained: Stepper, repeats: int) -> list[Row]:
    """4 rows at level 4 and 4 at level 1, against the two alone."""
    top, low = [4] * 4, [1] * 4
    ratios = []
    for _ in range(repeats):
        alone = min(measure(partial(chained.step, top), 1)) + min(
            measure(partial(chained.step, low), 1)
        )
        ratios.append(min(measure(partial(chained.step, top + low), 1)) / alone)
    return [
        Row.of("4 rows at level 4 and 4 at level 1 over the two alone", ratios, "x", "lower",
             target=1.05, headline=True)
    ]  # fmt: skip


def against_transformers(repeats: int) -> list[Row]:
    """One chain against LlamaForCausalLM with weights of the same shapes, step by step."""
    ours = Stepper(DENSE)
    theirs = _llama().eval()
    rows = []
    for num_rows, target in ((1, 1.05), (8, 1.5)):
        ratios = []
        with torch.inference_mode():
            tokens = torch.ones(num_rows, CACHED_TOKENS, dtype=torch.long)
            cache = theirs(tokens, use_cache=True).past_key_values

            def their_step(num_rows: int = num_rows, cache: object = cache) -> None:
                token = torch.ones(num_rows, 1, dtype=torch.long)
                out = theirs(token, past_key_values=cache, use_cache=True)
                out.logits[:, -1].argmax(-1)

            for _ in range(repeats):
                their_s = min(measure(their_step, 1))
                our_s = min(measure(partial(ours.step, [1] * num_rows), 1))
                ratios.append(their_s / our_s)
        rows.append(
            Row.of(f"one chain, {num_rows} rows: tokens/s over transformers'", ratios, "x",
                   "higher", target=target, headline=True)
        )  # fmt: skip
    return rows


def scheduling(repeats: int) -> list[Row]:
    """What the scheduler adds to a step of 256 running sequences."""
    scheduler = DecodeScheduler(
        PageLedger(16384), page_size=PAGE_SIZE, max_rows=256, max_waiting=64, max_batch_tokens=512,
        expected_output_tokens=500, eos_token_ids=(), cache_root=b"",
    )  # fmt: skip
    long = SamplingParams(max_tokens=500, temperature=0)
    for i in range(256):
        scheduler.start(scheduler.admit(DecodeRequest("r", (i,), 1 + i % 4, long, (), "")))

    def step() -> None:
        scheduler.complete_turn([(0,)] * len(scheduler.next_turn().slices))

    seconds = measure(step, 20 * repeats)
    return [
        Row.of("scheduling 256 rows, a step", [s * 1e3 for s in seconds], "ms", "lower", target=1.0,
             headline=True),
    ]  # fmt: skip


def lives(num_lives: int = 10_000) -> list[Row]:
    """Requests that come, are prefilled, decoded and gone: what they leave behind."""
    config = replace(CHAINED, d_model=128, d_ff=256, head_dim=16, vocab_size=512)
    loaded = LoadedModel(to_serving(ColmModel(config)), "")
    worker = DecodeWorker(loaded, DecodeConfig(kv_tokens=4096), "benchmark", epoch=1)
    worker.start()
    num_free = worker.status().num_free_pages
    for i in range(num_lives // 10):
        _live(worker, i)
    before = psutil.Process().memory_info().rss
    for i in range(num_lives):
        _live(worker, i)
    grown = psutil.Process().memory_info().rss - before
    worker.check_integrity()
    lost = num_free - worker.status().num_free_pages
    worker.stop()
    name = f"in {num_lives:,} requests admitted and finished"
    return [
        Row.of(f"pages lost {name}", [lost], "", "lower", target=0),
        Row.of(f"memory grown {name}", [grown / 1e6], "MB", "lower", target=1.0, headline=True),
    ]


def _live(worker: DecodeWorker, i: int) -> None:
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    prompt = tuple((i * j) % 512 for j in range(1, 40))
    request = DecodeRequest("r", prompt, 1 + i % 4, replace(GREEDY, max_tokens=2), (), "")
    sequence = worker.admit(request, events.put)
    worker.begin(sequence)
    while not isinstance(events.get(timeout=60), FinishReason):
        pass
    worker.release(sequence)


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=DENSE.vocab_size, hidden_size=DENSE.d_model, intermediate_size=DENSE.d_ff,
            num_hidden_layers=DENSE.num_layers, num_attention_heads=DENSE.num_heads,
            num_key_value_heads=DENSE.num_kv_heads, max_position_embeddings=DENSE.max_context,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    with Console().status("timing decode steps"):
        left_behind = lives()
        chained = Stepper(CHAINED)
        rows = against_roofline(chained, repeats) + mixed_levels(chained, repeats)
        del chained
        rows += against_transformers(repeats) + scheduling(repeats) + left_behind
    show("Decode, fp32, random weights of width 2048", rows)
    print(f"written to {save('decode', rows)}")


if __name__ == "__main__":
    main()
