"""Chunked prefill: any split, any company, the same keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.kv.pool import BlockTable, KvPool
from tests.engine.paged import (
    PAGES,
    decode,
    kv_of_whole_model,
    open_chain_1,
    poisoned_pool,
    prefill,
)
from tests.helpers import TINY, generate_alone, make_prompt, whole_model

PROMPT = make_prompt(70)


def assert_same_kv(pool: KvPool, table: BlockTable, folder: Path, prompt: tuple[int, ...]) -> None:
    for layer, (k, v) in kv_of_whole_model(folder, prompt, level=1).items():
        k_read, v_read = pool.read(layer, table, 0, len(prompt))
        torch.testing.assert_close(k_read, k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v, rtol=1e-4, atol=1e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, len(PROMPT) - 1), max_size=6, unique=True).map(sorted))
def test_any_split_into_chunks_equals_one_pass(folder: Path, cuts: list[int]) -> None:
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[0])
    prefill(open_chain_1(folder).model, pool, table, PROMPT[:-1], cuts)
    assert_same_kv(pool, table, folder, PROMPT[:-1])
    tokens = decode(whole_model(folder), pool, table, PROMPT, [3] * 3)
    assert tokens == generate_alone(folder, PROMPT, [3] * 3)


def test_several_prompts_in_one_pass_equal_each_alone(folder: Path) -> None:
    pool, model = poisoned_pool(folder), open_chain_1(folder).model
    prompts = [make_prompt(n, seed=n) for n in (50, 1, 33)]
    tables = [pool.table(pages) for pages in PAGES]
    # The first starts mid-prompt: masks differ between the chunks of one pass.
    prefill(model, pool, tables[0], prompts[0][:20], [])
    run_prefill(
        model,
        pool,
        [
            PrefillChunk(prompt[start:], start, table)
            for prompt, start, table in zip(prompts, (20, 0, 0), tables, strict=True)
        ],
    )
    for table, prompt in zip(tables, prompts, strict=True):
        assert_same_kv(pool, table, folder, prompt)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_kv_of_chain_1_is_that_of_the_whole_model_at_every_level(folder: Path, level: int) -> None:
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[0])
    prefill(open_chain_1(folder).model, pool, table, PROMPT, [31])
    stored = kv_of_whole_model(folder, PROMPT, level)
    assert sorted(stored) == list(range(TINY.num_layers))
    for layer, (k, v) in stored.items():
        k_read, v_read = pool.read(layer, table, 0, len(PROMPT))
        torch.testing.assert_close(k_read, k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v, rtol=1e-4, atol=1e-5)


def test_layers_are_announced_in_order_once_their_kv_is_there(folder: Path) -> None:
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[0])
    announced = []

    def on_layer(layer: int) -> None:
        announced.append(layer)
        for other in range(TINY.num_layers):
            is_there = bool(pool.read(other, table, 0, 40)[0].isfinite().all())
            assert is_there == (other <= layer)

    chunk = PrefillChunk(PROMPT[:40], 0, table)
    run_prefill(open_chain_1(folder).model, pool, [chunk], on_layer)
    assert announced == list(range(TINY.num_layers))


def test_what_on_layer_raises_ends_the_pass(folder: Path) -> None:
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[0])

    def on_layer(layer: int) -> None:
        if layer == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_prefill(
            open_chain_1(folder).model, pool, [PrefillChunk(PROMPT[:8], 0, table)], on_layer
        )
    assert pool.read(2, table, 0, 8)[0].isnan().all(), "the layer after was computed"
