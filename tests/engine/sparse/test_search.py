"""The search finds what was planted, within its budget, and numbers heads as the model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.config import SparseConfig
from colm_serve.engine.loading import load_for_serving
from colm_serve.engine.sparse.head_keys import BlockGrid
from colm_serve.engine.sparse.mass import keys_read
from colm_serve.engine.sparse.pattern_file import save_patterns
from colm_serve.engine.sparse.search import best_pattern, search_patterns
from colm_serve.engine.sparse.selectors import AShape, BlockSparse, Dense, VerticalSlash
from colm_serve.engine.sparse.sparsity import make_sparsity, select_keys
from tests.engine.sparse.planted import on_blocks, on_column, on_slash
from tests.helpers import TINY, make_model_folder, make_prompt


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (on_column(500, 1024), VerticalSlash),
        (on_slash(400, 1024), VerticalSlash),
        (on_blocks({b: 11 * b % 7 for b in range(8, 16)}, 1024), BlockSparse),
        (on_slash(10, 1024), AShape),
    ],
    ids=["column", "slash", "blocks", "neighbours"],
)
def test_the_planted_pattern_wins_within_the_budget(
    planted: tuple[torch.Tensor, torch.Tensor], kind: type
) -> None:
    q_SH, k_SH = planted
    q_TH = q_SH[512:]
    found = best_pattern(q_TH, k_SH, budget=0.5)
    assert isinstance(found.selector, kind)
    assert found.score > 0.8
    grid = BlockGrid(512, 1024)
    index = select_keys([found.selector], q_TH[:, None], k_SH[:, None], grid)
    assert keys_read(index, grid).item() <= 0.5


def test_a_whole_budget_is_dense_and_none_is_the_rows_own_blocks() -> None:
    q_SH, k_SH = torch.randn(2, 256, 16)
    assert best_pattern(q_SH, k_SH, 1.0).selector == Dense()
    assert best_pattern(q_SH, k_SH, 1.0).score == 1
    assert best_pattern(q_SH, k_SH, 0.01).selector == AShape(0, 0)


def test_every_chain_1_head_of_every_layer_gets_a_pattern(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colm_serve.engine.sparse.search.CHUNK_TOKENS", 200)
    loaded = load_for_serving(folder, num_chains=1, with_head=True)
    layers = search_patterns(loaded, make_prompt(405), 0.5)
    assert [len(heads) for heads in layers] == [TINY.heads_per_chain[0]] * TINY.num_layers
    assert all(0 < pattern.score <= 1 for heads in layers for pattern in heads)


def test_heads_are_numbered_as_the_model_numbers_them(tmp_path: Path) -> None:
    """In memory an interleaving model's heads stand in another order than in its files."""
    config = replace(TINY, chains=(8,), num_kv_heads=2, kv_repeat="interleave", num_layers=2)
    folder = make_model_folder(tmp_path / "interleave", config)
    loaded = load_for_serving(folder, num_chains=1, with_head=True)
    tiled_folder = make_model_folder(tmp_path / "tile", replace(config, kv_repeat="tile"))
    tiled = load_for_serving(tiled_folder, num_chains=1, with_head=True)
    tokens = make_prompt(300)
    layers = search_patterns(loaded, tokens, 0.5)
    # The same weights in memory, filed under other numbers.
    repeats = config.num_heads // config.num_kv_heads
    for heads, in_memory in zip(layers, search_patterns(tiled, tokens, 0.5), strict=True):
        for head, pattern in enumerate(in_memory):
            assert pattern == heads[head % 2 * repeats + head // 2]
    path = tmp_path / "patterns.json"
    save_patterns(path, layers)
    sparse = SparseConfig(selector="minference", pattern_file=path, min_tokens=1)
    served = make_sparsity(sparse, config)
    assert served is not None
    for heads, selectors in zip(layers, served.selectors, strict=True):
        for head, selector in enumerate(selectors):
            assert selector == heads[head % 2 * repeats + head // 2].selector
