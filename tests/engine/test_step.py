"""Decode steps: mixed levels in a batch, level switches, and what a step is said to cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colm_serve.core import SamplingParams, StepCost
from colm_serve.engine.step import StepRow, measure_step_cost, run_step
from tests.engine.paged import (
    PAGES,
    decode,
    kv_of_whole_model,
    open_chain_1,
    poisoned_pool,
    prefill,
)
from tests.helpers import GREEDY, generate_alone, make_prompt, whole_model

SAMPLED = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=11)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 70])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prefill_on_chain_1_then_steps_equal_the_whole_model(
    folder: Path, num_tokens: int, sampling: SamplingParams
) -> None:
    prompt = make_prompt(num_tokens, seed=num_tokens)
    for level in (1, 2, 3):
        pool = poisoned_pool(folder)
        table = pool.table(PAGES[0])
        prefill(open_chain_1(folder).model, pool, table, prompt[:-1], [8])
        tokens = decode(whole_model(folder), pool, table, prompt, [level] * 5, sampling)
        assert tokens == generate_alone(folder, prompt, [level] * 5, sampling)


@pytest.mark.parametrize(
    "levels", [[3, 3, 2, 1], [1, 1, 2, 3], [2, 1, 3, 1]], ids=["down", "up", "to and fro"]
)
def test_a_level_switch_equals_the_whole_model_switching_there(
    folder: Path, levels: list[int]
) -> None:
    prompt = make_prompt(40)
    per_token = [level for level in levels for _ in range(4)]
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[1])
    prefill(open_chain_1(folder).model, pool, table, prompt[:-1], [])
    tokens = decode(whole_model(folder), pool, table, prompt, per_token)
    assert tokens == generate_alone(folder, prompt, per_token)
    assert tokens != generate_alone(folder, prompt, per_token[:1] * 16), "levels do not differ"


def test_rows_at_mixed_levels_equal_each_alone(folder: Path) -> None:
    pool, model = poisoned_pool(folder), whole_model(folder)
    prompts = [make_prompt(n, seed=n) for n in (33, 5, 60)]
    samplings = [GREEDY, SAMPLED, GREEDY]
    levels = (3, 2, 1)
    tables = [pool.table(pages) for pages in PAGES]
    texts = [list(prompt) for prompt in prompts]
    for prompt, table in zip(prompts, tables, strict=True):
        prefill(open_chain_1(folder).model, pool, table, prompt[:-1], [])
    for _ in range(6):
        rows = [
            StepRow(text[-1], len(text) - 1, level, table, sampling)
            for text, level, table, sampling in zip(texts, levels, tables, samplings, strict=True)
        ]
        for text, token in zip(texts, run_step(model, pool, rows).tokens, strict=True):
            text.append(token)
    for prompt, text, level, sampling in zip(prompts, texts, levels, samplings, strict=True):
        assert text[len(prompt) :] == generate_alone(folder, prompt, [level] * 6, sampling)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_kv_that_steps_write_is_level_independent(folder: Path, level: int) -> None:
    prompt = make_prompt(20)
    pool = poisoned_pool(folder)
    table = pool.table(PAGES[2])
    prefill(open_chain_1(folder).model, pool, table, prompt[:-1], [])
    tokens = [*prompt, *decode(whole_model(folder), pool, table, prompt, [level] * 6)]
    # The last token's own K and V are written by the step that it would begin.
    for layer, (k, v) in kv_of_whole_model(folder, tokens[:-1], level=1).items():
        k_read, v_read = pool.read(layer, table, 0, len(tokens) - 1)
        torch.testing.assert_close(k_read, k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v, rtol=1e-4, atol=1e-5)


def test_rows_have_to_be_sorted_by_level(folder: Path) -> None:
    pool = poisoned_pool(folder)
    rows = [StepRow(1, 0, level, pool.table(PAGES[0]), GREEDY) for level in (1, 3)]
    with pytest.raises(AssertionError, match="highest level first"):
        run_step(whole_model(folder), pool, rows)


def test_measured_step_cost_has_a_share_for_each_chain(folder: Path) -> None:
    cost = measure_step_cost(whole_model(folder), poisoned_pool(folder), max_rows=8, repeats=3)
    assert len(cost.chain_s) == len(cost.row_s) == 3
    assert all(s >= 0 for s in (*cost.chain_s, *cost.row_s))
    assert 0 < cost.step_s((1,)) <= cost.step_s((1, 1, 1)) <= cost.step_s((8, 8, 8)) < 10


def test_step_cost_adds_chains_and_further_rows() -> None:
    cost = StepCost(chain_s=(1.0, 2.0, 4.0), row_s=(0.1, 0.2, 0.4))
    assert cost.step_s((1,)) == 1.0
    assert cost.step_s((3, 2)) == pytest.approx(1.0 + 0.2 + 2.0 + 0.2)
    assert cost.step_s((1, 1, 0)) == 3.0
    assert cost.step_s(()) == 0
