"""Logprobs of chosen and of likeliest tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run
from tests.helpers import sample_all


def scores(num_rows: int, vocab_size: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_they_are_the_log_softmax_of_the_models_scores(temperature: float, num_top: int) -> None:
    logits_BV = scores(1)
    asked = SamplingParams(
        1, temperature=temperature, top_k=3, logit_bias=((7, 100.0),), logprobs=num_top
    )
    request = DecodeRequest("r", (1,), 1, asked, (), "")
    processor = LogitsProcessor.make(request, [1], ())
    [sampled] = sample_all(logits_BV, [Run(asked, 1, processor)])
    expected = torch.log_softmax(logits_BV[0].double(), dim=0)
    assert sampled.logprobs is not None
    [got] = sampled.logprobs
    assert sampled.tokens == [7], "biased"
    assert got.chosen.token_id == 7
    assert got.chosen.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = expected.argsort(descending=True)[:num_top].tolist()
    assert [entry.token_id for entry in got.top] == best
    for entry in got.top:
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)


def test_a_vocabulary_may_be_smaller_than_the_number_asked() -> None:
    [sampled] = sample_all(scores(1, vocab_size=3), [Run(SamplingParams(1, logprobs=20), 1)])
    assert sampled.logprobs is not None
    assert len(sampled.logprobs[0].top) == 3


def test_only_rows_that_ask_have_them() -> None:
    plain, asked = Run(SamplingParams(1), 1), Run(SamplingParams(1, logprobs=0), 1)
    have = [
        sampled.logprobs is not None for sampled in sample_all(scores(3), [plain, asked, plain])
    ]
    assert have == [False, True, False]


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 20), st.booleans())
def test_a_rows_do_not_depend_on_the_others(seed: int, num_top: int, has_ties: bool) -> None:
    logits_BV = scores(3, seed=seed)
    if has_ties:
        logits_BV = logits_BV.round()
    mine = Run(SamplingParams(1, seed=seed, logprobs=num_top), 9)
    others = [
        Run(SamplingParams(1, temperature=0, logprobs=20), 3),
        Run(SamplingParams(1), 4),
    ]
    [alone] = sample_all(logits_BV[:1], [mine])
    together = sample_all(logits_BV, [mine, *others])
    turned = sample_all(logits_BV.flip(0), [*others, mine])
    assert alone == together[0] == turned[2]
