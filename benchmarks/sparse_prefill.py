"""Sparse prefill: what it costs in loss and attention mass, and how fast it is, against dense.

Cost is measured where attention is real: the bundled model reads held-out text, chain 1 computes
all but the last tokens of a window sparsely, and every level scores those by its keys and values.
Windows are of the 1,024 tokens that the model was trained on, and of its whole context of 4,096,
where its loss is higher with dense attention too.

Speed is measured where prompts are long: chain 1 of {8,8,8,8} in the shape of LLaMA-3.2-1B. Random
weights attend to everything alike, so it is given shares of the keys to read, those among them
that the bundled model needed; choosing them, as the adaptive selector does, is in the time.

What this cannot show: how few keys a model trained on long text needs at 32,768 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from reporting import Row, save, show
from rich.console import Console
from torch import Tensor

from colm_serve.config import SparseConfig
from colm_serve.engine.loading import load_for_serving, make_pool, to_serving
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.sparse.antidiagonal import block_mass
from colm_serve.engine.sparse.head_keys import BlockGrid, HeadKeys
from colm_serve.engine.sparse.mass import keys_read, mass_kept
from colm_serve.engine.sparse.pattern_file import save_patterns
from colm_serve.engine.sparse.search import search_patterns
from colm_serve.engine.sparse.sparsity import SelectedSparsity, make_sparsity
from colm_serve.engine.step import Segment, run_pass
from colm_serve.kernels.sparse_attention import SparseIndex
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.paged import Span, Sparsity
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import read_corpus
from colm_serve.training.document_encoder import DocumentEncoder

MODEL = Path(__file__).parent.parent / "models" / "stdlib-air"
LONG = ColmConfig(
    vocab_size=1, chains=(8, 8, 8, 8), d_model=2048, d_ff=8192, num_layers=3, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=131072,
)  # fmt: skip
GAMMAS = (0.8, 0.9, 0.95, 0.995)
BUDGETS = (0.25, 0.5)
#: Shares of the keys beside those that the bundled model needs: longer prompts need fewer.
SHARES = (0.05, 0.1, 0.2)
PAGE_SIZE = 16
CHUNK_TOKENS = 2048
NUM_SCORED = 256
TARGET_SPEED_UP, TARGET_MASS = 2.0, 0.99


@dataclass(frozen=True)
class Policy:
    """A way to choose keys, and what it kept of the bundled model's attention."""

    name: str
    sparse: SparseConfig
    read: float = 1.0
    mass: float = 1.0


class Recorder:
    """A `Sparsity` that looks at what another one keeps, head by head."""

    def __init__(self, inner: Sparsity) -> None:
        self._inner = inner
        self.mass: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.read: list[float] = []

    def index(self, layer: int, span: Span, q_TQH: Tensor, pool: KvPool) -> SparseIndex | None:
        index = self._inner.index(layer, span, q_TQH, pool)
        # Early chunks fit into any budget; the last one sees most.
        if index is not None and span.stop == span.num_prompt_tokens:
            k_SNH = pool.read_keys(layer, span.table, span.stop)
            for head, mass in enumerate(mass_kept(q_TQH, k_SNH, [index])[0].tolist()):
                self.mass[layer, head].append(mass)
            self.read += keys_read(index, BlockGrid(span.start, span.stop)).tolist()
        return index


class Bundled:
    """The bundled model over windows of held-out text."""

    def __init__(self, context: int, num_windows: int) -> None:
        self.loaded = load_for_serving(MODEL, num_chains=None, with_head=True)
        self._pool = make_pool(self.loaded, context // PAGE_SIZE, PAGE_SIZE)
        self._table = self._pool.table(range(context // PAGE_SIZE))
        recipe = TrainConfig.load(MODEL / "train.yaml")
        corpus = read_corpus(None, recipe.heldout_fraction, recipe.exclude)
        tokenizer = load_model_tokenizer(MODEL, recipe.model.vocab_size)
        encode = DocumentEncoder(tokenizer, recipe.model, corpus.name).encode
        heldout = encode(corpus.heldout).astype(int)
        starts = np.linspace(0, len(heldout) - context - 1, num_windows).astype(int)
        self._windows = [heldout[start : start + context + 1].tolist() for start in starts]
        train = encode(corpus.train[:40]).astype(int)
        self.train_tokens: list[int] = train[:context].tolist()

    def losses(self, sparsity: Sparsity | None) -> list[list[float]]:
        """Nats a token of the text after the prompt, by level and window."""
        losses: list[list[float]] = [[] for _ in range(self.loaded.model.num_chains)]
        for window in self._windows:
            prompt, tail = window[: -NUM_SCORED - 1], window[-NUM_SCORED - 1 :]
            prefill(self.loaded.model, self._pool, prompt, sparsity)
            for level, of_level in enumerate(losses, start=1):
                segment = Segment(tail[:-1], len(prompt), level, self._table, NUM_SCORED)
                logits_SV = run_pass(self.loaded.model, self._pool, [segment]).logits_SV
                of_level.append(F.cross_entropy(logits_SV, torch.tensor(tail[1:])).item())
        return losses


def prefill(
    model: ServingModel, pool: KvPool, prompt: list[int], sparsity: Sparsity | None
) -> float:
    """Compute a prompt's keys and values in chunks; seconds."""
    table = pool.table(range(pool.num_pages))
    begin = time.perf_counter()
    # The first chunk is the short one: the last is looked at.
    starts = sorted({0, *range(len(prompt) % CHUNK_TOKENS, len(prompt) + 1, CHUNK_TOKENS)})
    for start, stop in pairwise(starts):
        chunk = PrefillChunk(prompt[start:stop], start, table, len(prompt))
        run_prefill(model, pool, [chunk], sparsity=sparsity)
    return time.perf_counter() - begin


def policies(bundled: Bundled, folder: Path) -> list[Policy]:
    """Adaptive thresholds, and patterns searched on training text."""
    found = [
        Policy(f"adaptive {gamma:g}", SparseConfig(selector="adaptive", gamma=gamma, min_tokens=1))
        for gamma in GAMMAS
    ]
    for budget in BUDGETS:
        path = folder / f"{budget}.json"
        save_patterns(path, search_patterns(bundled.loaded, bundled.train_tokens, budget))
        sparse = SparseConfig(selector="minference", pattern_file=path, min_tokens=1)
        found.append(Policy(f"patterns searched at {budget:.0%} of the keys", sparse))
    return found


def cost(context: int, num_windows: int) -> tuple[list[Row], list[Policy]]:
    """Loss above dense at every level, mass kept and keys read; the policies with the latter."""
    bundled = Bundled(context, num_windows)
    config = bundled.loaded.model.config
    exact = bundled.losses(None)
    rows, measured = [], []
    with tempfile.TemporaryDirectory() as folder:
        for policy in policies(bundled, Path(folder)):
            sparsity = make_sparsity(policy.sparse, config)
            assert sparsity is not None
            recorder = Recorder(sparsity)
            losses = bundled.losses(recorder)
            by_head = [mean(mass) for mass in recorder.mass.values()]
            policy = replace(policy, read=mean(recorder.read), mass=mean(by_head))
            measured.append(policy)
            case = f"windows of {context}, {policy.name}"
            mass = Row.of(
                f"{case}: mass kept", [policy.mass], "", "higher",
                note="of the last chunk's attention; the spread is over heads",
            )  # fmt: skip
            read = Row.of(
                f"{case}: keys read", [policy.read], "", "lower",
                note="of the last chunk's; the spread is over heads and windows",
            )  # fmt: skip
            rows += [
                replace(mass, spread=(min(by_head), max(by_head))),
                replace(read, spread=(min(recorder.read), max(recorder.read))),
            ]
            for level, pair in enumerate(zip(losses, exact, strict=True), start=1):
                differences = [a - b for a, b in zip(*pair, strict=True)]
                level_case = f"{case}, level {level}: loss above {mean(pair[1]):.3f}"
                row = Row.of(level_case, [mean(differences)], "nats", "lower")
                rows.append(replace(row, spread=(min(differences), max(differences))))
    return rows, measured


@dataclass(frozen=True)
class FixedShare:
    """Chooses as `Antidiagonal` does, but a share of the key blocks whatever their mass."""

    share: float

    def select(self, q_TH: Tensor, k_SH: Tensor, grid: BlockGrid) -> HeadKeys:
        mass_BJ = block_mass(q_TH, k_SH, grid)
        num_kept_B = torch.from_numpy(grid.causal_BJ.sum(axis=1)) * self.share
        rank_BJ = torch.arange(mass_BJ.shape[1]).expand_as(mass_BJ)
        order_BJ = mass_BJ.argsort(dim=1, descending=True)
        is_kept_BJ = torch.zeros_like(mass_BJ, dtype=torch.bool)
        is_kept_BJ.scatter_(1, order_BJ, rank_BJ < num_kept_B[:, None])
        return HeadKeys.of_blocks(is_kept_BJ.numpy())


class Stopwatch:
    """A `Sparsity` that sums up how long another one takes."""

    def __init__(self, inner: Sparsity) -> None:
        self._inner = inner
        self.seconds = 0.0

    def index(self, layer: int, span: Span, q_TQH: Tensor, pool: KvPool) -> SparseIndex | None:
        begin = time.perf_counter()
        index = self._inner.index(layer, span, q_TQH, pool)
        self.seconds += time.perf_counter() - begin
        return index


def speed(measured: list[Policy], num_tokens: int, repeats: int) -> list[Row]:
    """Whole prefills at the share of keys that each policy read, in turns with dense ones."""
    model = ColmModel(LONG, num_chains=1, with_head=False)
    loaded = LoadedModel(to_serving(model), "")
    pool = make_pool(loaded, num_tokens // PAGE_SIZE, PAGE_SIZE)
    prompt = [0] * num_tokens
    shares = sorted({*SHARES, *(policy.read for policy in measured)})
    dense: list[float] = []
    sparse: dict[float, list[float]] = defaultdict(list)
    choosing: dict[float, list[float]] = defaultdict(list)
    prefill(loaded.model, pool, prompt[: 2 * CHUNK_TOKENS], None)
    for _ in range(repeats):
        dense.append(prefill(loaded.model, pool, prompt, None))
        for share in shares:
            selectors = [[FixedShare(share)] * LONG.heads_per_chain[0]] * LONG.num_layers
            watch = Stopwatch(SelectedSparsity(selectors, min_tokens=1))
            sparse[share].append(prefill(loaded.model, pool, prompt, watch))
            choosing[share].append(watch.seconds)
    rows = [Row.of(f"{num_tokens} tokens: dense", dense, "s", "lower")]
    reaching = min((policy for policy in measured if policy.mass >= TARGET_MASS),
                   key=lambda policy: policy.read, default=None)  # fmt: skip
    for share in shares:
        speed_ups = [a / b for a, b in zip(dense, sparse[share], strict=True)]
        row = Row.of(f"{num_tokens} tokens, {share:.0%} of the keys read: speed-up over dense",
                     speed_ups, "x", "higher", headline=share in SHARES)  # fmt: skip
        if reaching is not None and share == reaching.read:
            note = f"what {reaching.mass:.1%} of the bundled model's attention mass needs: at most "
            note += f"{1 / share:.2f}x, since a tiny model's first layer attends to all alike"
            row = replace(row, target=TARGET_SPEED_UP, note=note, headline=True)
        rows.append(row)
    parts = [a / b for times in choosing.values() for a, b in zip(times, dense, strict=True)]
    case = f"{num_tokens} tokens: choosing keys, of dense's time"
    return [*rows, Row.of(case, parts, "", "lower", target=0.05, headline=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with Console().status("scoring held-out text and timing prefill"), torch.inference_mode():
        trained, _ = cost(1024, arguments.windows)
        whole, measured = cost(4096, arguments.windows)
        rows = speed(measured, arguments.tokens, arguments.repeats) + trained + whole
    show("Sparse prefill of chain 1 against dense", rows)
    print(f"written to {save('sparse_prefill', rows)}")


if __name__ == "__main__":
    main()
