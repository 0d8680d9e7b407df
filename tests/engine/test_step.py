"""Decode steps: mixed levels in a batch, level switches, and what a step is said to cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.config.decode import MAX_DRAFTS
from colm_serve.core import SamplingParams, StepCost
from colm_serve.engine.loading import to_serving
from colm_serve.engine.sampler import Run
from colm_serve.engine.step import Segment, run_pass
from colm_serve.model.cpu_model import CpuModel
from tests.engine.paged import (
    PAGES,
    decode,
    decode_row,
    kv_of_whole_model,
    open_chain_1,
    poisoned_pool,
    prefill,
)
from tests.helpers import (
    GREEDY,
    TINY,
    before_each_block,
    generate_alone,
    make_prompt,
    next_logits,
    sample_rows,
    whole_model,
)

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
        rows = [decode_row(*row) for row in zip(texts, levels, tables, strict=True)]
        scores = run_pass(model, pool, rows)
        runs = [Run(sampling, len(text)) for sampling, text in zip(samplings, texts, strict=True)]
        for text, token in zip(texts, sample_rows(scores.logits_SV, *runs), strict=True):
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
    rows = [Segment((1,), 0, level, pool.table(PAGES[0])) for level in (1, 3)]
    with pytest.raises(AssertionError, match="highest level first"):
        run_pass(whole_model(folder), pool, rows)


@pytest.mark.parametrize("is_packed", [False, True], ids=["torch", "packed"])
def test_one_pass_scores_what_each_segment_asks_for(folder: Path, is_packed: bool) -> None:
    """Several drafts of one sequence, a decode row, the end of a prompt, and a prompt to store."""
    model = to_serving(whole_model(folder)) if is_packed else whole_model(folder)
    texts = [make_prompt(n, seed=n) for n in (40, 21, 33, 50)]
    pool = poisoned_pool(folder)
    tables = [pool.table(pages) for pages in (*PAGES, (0, 1, 3, 4))]
    segments = [
        Segment(text[start:], start, level, table, num_scored)
        for text, table, start, level, num_scored in zip(
            texts, tables, (36, 20, 13, 30), (3, 2, 2, 1), (4, 1, 5, 0), strict=True
        )
    ]
    for segment, text in zip(segments, texts, strict=True):
        prefill(open_chain_1(folder).model, pool, segment.table, text[: segment.start], [])
    scores = run_pass(model, pool, segments)
    expected = [
        (text[: end + 1], segment.level)
        for segment, text in zip(segments, texts, strict=True)
        for end in range(len(text) - segment.num_scored, len(text))
    ]
    assert [level for _, level in expected] == [3] * 4 + [2] * 6
    whole = whole_model(folder)
    for logits_V, (tokens, level) in zip(scores.logits_SV, expected, strict=True):
        close(logits_V, next_logits(whole, tokens, level)[0])
    for level in (1, 2):
        lower_SV = model.logits(scores.x_SD, [len(expected)] * level)
        for logits_V, (tokens, _) in zip(lower_SV, expected, strict=True):
            close(logits_V, next_logits(whole, tokens, level)[0])
    for segment, text in zip(segments, texts, strict=True):
        for layer, (k, v) in kv_of_whole_model(folder, text, level=1).items():
            k_read, v_read = pool.read(layer, segment.table, 0, len(text))
            close(k_read, k)
            close(v_read, v)


@torch.inference_mode()
def test_a_verification_scores_its_rows_as_steps_would_bit_by_bit(folder: Path) -> None:
    model = CpuModel.pack(whole_model(folder))
    text = make_prompt(60 + MAX_DRAFTS)
    pool = poisoned_pool(folder)
    for level in (1, 2, 3):
        table = pool.table(PAGES[0])
        prefill(open_chain_1(folder).model, pool, table, text[:59], [])
        rows = [Segment(text[i : i + 1], i, level, table) for i in range(59, len(text))]
        alone_SV = torch.cat([run_pass(model, pool, [row]).logits_SV for row in rows])
        drafts = Segment(text[59:], 59, level, table, 1 + MAX_DRAFTS)
        assert torch.equal(run_pass(model, pool, [drafts]).logits_SV, alone_SV)


def test_a_pass_without_scores_stops_after_the_last_layers_kv(folder: Path) -> None:
    prompt, pool = make_prompt(40), poisoned_pool(folder)
    table = pool.table(PAGES[0])
    model = to_serving(whole_model(folder))
    ran: list[int] = []
    before_each_block(model, lambda: ran.append(1))
    scores = run_pass(model, pool, [Segment(prompt, 0, 1, table, num_scored=0)])
    assert len(ran) == TINY.num_layers - 1
    assert scores.logits_SV.shape == (0, TINY.vocab_size)
    for layer, (k, v) in kv_of_whole_model(folder, prompt, level=1).items():
        k_read, v_read = pool.read(layer, table, 0, len(prompt))
        close(k_read, k)
        close(v_read, v)
    with pytest.raises(AssertionError, match="at level 1"):
        run_pass(model, pool, [Segment(prompt, 0, 2, table, num_scored=0)])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_step_cost_adds_chains_further_rows_and_what_they_attend_to() -> None:
    cost = StepCost(chain_s=(1.0, 2.0, 4.0), row_s=(0.1, 0.2, 0.4))
    assert cost.step_s((1,)) == 1.0
    assert cost.step_s((3, 2)) == pytest.approx(1.0 + 0.2 + 2.0 + 0.2)
    assert cost.step_s((1, 1, 0)) == 3.0
    assert cost.step_s(()) == 0
    cost = replace(cost, wide_row_s=(0.01, 0.02, 0.04), cached_token_s=(0.001, 0.002, 0.004))
    assert cost.step_s((8, 8)) == pytest.approx(1.7 + 3.4)
    assert cost.step_s((10, 8)) == pytest.approx(1.9 + 0.02 + 3.4)
    assert cost.step_s((1, 1), (100, 10)) == pytest.approx(3.0 + 0.1 + 0.02)
