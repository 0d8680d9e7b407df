"""The packed model is the model that was loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_serve.core import KvLayout
from colm_serve.kv.pool import KvPool
from colm_serve.model.checkpoint import load_cpu_model, load_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.paged import PagedContext, Span
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import level_rows
from tests.helpers import TINY, make_model_folder

VARIANTS = {
    "shared": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "per_level": replace(TINY, head="per_level"),
    "gelu": replace(TINY, ffn="gelu"),
    "interleave": replace(TINY, kv_repeat="interleave"),
    "one chain": replace(TINY, chains=(1,)),
}
#: (level from the top, tokens, of which are cached): single tokens, short and long spans.
SPANS = [(0, 1, 5), (0, 20, 3), (1, 1, 0), (1, 4, 40), (9, 1, 63), (9, 17, 0)]


def make_pool(config: ColmConfig) -> KvPool:
    """Every slot filled, as if earlier tokens stood there."""
    torch.manual_seed(1)
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, "float32")
    pool = KvPool(layout, 4 * len(SPANS), 16)
    every = pool.table(range(pool.num_pages))
    for layer in range(config.num_layers):
        k_v = torch.randn(2, pool.num_pages * 16, config.num_kv_heads, config.head_dim)
        pool.write(layer, every, 0, k_v[0], k_v[1])
    return pool


@torch.inference_mode()
def run(model: ServingModel, pool: KvPool, which: list[int]) -> Tensor:
    """Scores of every row of these spans in one pass."""
    spans: list[Span] = []
    tokens = []
    for i in which:
        from_top, length, start = SPANS[i]
        table = pool.table([(i + 6 * page) % pool.num_pages for page in range(4)])
        level = max(1, model.num_chains - from_top)
        spans.append(Span(table, sum(s.num_rows for s in spans), length, start, level))
        tokens += [(7 * i + t) % 97 for t in range(length)]
    positions = torch.cat([torch.arange(s.start, s.stop) for s in spans])
    num_rows = level_rows([s.level for s in spans for _ in range(s.num_rows)])
    context = PagedContext(model.config, pool, spans)
    return model.logits(model(torch.tensor(tokens), positions, num_rows, context), num_rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_and_cache_are_the_loaded_model_s(name: str, tmp_path: Path) -> None:
    config: ColmConfig = VARIANTS[name]
    folder = make_model_folder(tmp_path / "model", config)
    plain, packed = load_model(folder), load_cpu_model(folder)
    assert plain.kv_identity == packed.kv_identity
    pools = make_pool(config), make_pool(config)
    everything = list(range(len(SPANS)))
    expected = run(plain.model, pools[0], everything)
    actual = run(packed.model, pools[1], everything)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for layer in range(config.num_layers):
        every = pools[0].table(range(pools[0].num_pages))
        for ours, theirs in zip(
            pools[1].read(layer, every, 0, 64 * len(SPANS)),
            pools[0].read(layer, every, 0, 64 * len(SPANS)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_sequence_has_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    model = load_cpu_model(make_model_folder(tmp_path / "model")).model
    together = run(model, make_pool(TINY), list(range(len(SPANS))))
    row = 0
    for i, (_, length, _) in enumerate(SPANS):
        alone = run(model, make_pool(TINY), [i])
        assert torch.equal(alone, together[row : row + length]), SPANS[i]
        row += length


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.int8, 0.05)])
def test_small_weights_err_little(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    exact = run(load_cpu_model(folder).model, make_pool(TINY), [0, 2, 4])
    small = run(load_cpu_model(folder, weight_dtype=dtype).model, make_pool(TINY), [0, 2, 4])
    error = (small - exact).norm() / exact.norm()
    assert 0 < error < tolerance


def test_packing_a_model_in_memory_leaves_it_as_it_was(tmp_path: Path) -> None:
    model = load_model(make_model_folder(tmp_path / "model")).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = CpuModel.pack(model)
    torch.testing.assert_close(
        run(packed, make_pool(TINY), [0, 3]), run(model, make_pool(TINY), [0, 3]),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
