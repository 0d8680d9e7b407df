"""Any scores and any rules give a token of the vocabulary, or say that there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.engine.failed import Failed
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run, Sampled, best_tokens, draft, sample
from colm_serve.errors import InvalidArgument, RowFailed

VOCAB_SIZE = 7
MAX_FLOAT = float(np.finfo(np.float32).max)
#: Anything that a row of a model's scores could have, borders more often than hypothesis would.
score = st.floats(width=32) | st.sampled_from(
    [math.nan, math.inf, -math.inf, 0.0, 1e-45, -1e-45, MAX_FLOAT, -MAX_FLOAT, 1.0, 1.0]
)
scores = st.lists(score, min_size=VOCAB_SIZE, max_size=VOCAB_SIZE).map(torch.tensor)
finite_scores = st.lists(
    st.floats(-1e4, 1e4, width=32) | st.just(-math.inf), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE
).map(torch.tensor)
token_id = st.integers(0, VOCAB_SIZE - 1)
rules = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.01, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(token_id, st.floats(-100, 100)).map(
            lambda biases: tuple(biases.items())
        ),
        "min_tokens": st.integers(0, 8),
    },
)
draws = st.fixed_dictionaries(
    {"temperature": st.floats(0, 2) | st.sampled_from([0.0, 1e-5, 1e-3, 2.0])},
    optional={
        "top_p": st.floats(1e-9, 1) | st.sampled_from([1e-9, 1.0]),
        "min_p": st.floats(0, 1) | st.sampled_from([1e-45, 1e-38, 1.0]),
        "top_k": st.integers(0, 9) | st.just(2**31 - 1),
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.integers(0, 20),
    },
)


def is_known(logits_V: Tensor) -> bool:
    """Whether these are scores: numbers, or -inf, but not -inf alone."""
    values = logits_V.tolist()
    return not any(v != v or v == math.inf for v in values) and max(values) > -math.inf


@settings(deadline=None, max_examples=400)
@given(st.lists(scores, min_size=1, max_size=4), draws, st.none() | scores)
def test_a_draw_is_a_token_that_has_a_score(
    rows: list[Tensor], fields: dict[str, Any], drafter_V: Tensor | None
) -> None:
    sampling = SamplingParams(8, **fields)
    drafter_logits = None if drafter_V is None else drafter_V[None]
    run = Run(sampling, 3, drafter_logits_SV=drafter_logits)
    is_drafter_asked = sampling.temperature > 0 and drafter_V is not None
    for logits_V, made in zip(rows, sample(torch.stack(rows), [run] * len(rows)), strict=True):
        if not is_known(logits_V):
            assert isinstance(made, Failed)
            assert made.is_of_model
            assert isinstance(made.error, RowFailed)
        elif is_drafter_asked and drafter_V is not None and not is_known(drafter_V):
            assert isinstance(made, Failed)
            assert not made.is_of_model, "its keys and values are sound"
        else:
            assert isinstance(made, Sampled)
            [token] = made.tokens
            assert logits_V[token] > -math.inf


@settings(deadline=None, max_examples=400)
@given(finite_scores.filter(is_known), draws, rules, st.lists(token_id, min_size=1, max_size=8))
def test_rules_within_their_bounds_leave_a_token_of_any_model_s_scores(
    logits_V: Tensor, fields: dict[str, Any], ruled: dict[str, Any], tokens: list[int]
) -> None:
    # Tokens that a rule forbids to end the text are ruled out, so one is to be left beside them.
    logits_V[0] = logits_V[0].clamp(min=0)
    [made] = sample(logits_V[None], [ruled_run(fields, ruled, tokens)])
    assert isinstance(made, Sampled)
    assert logits_V[made.tokens[0]] > -math.inf


@settings(deadline=None, max_examples=400)
@given(scores, draws, rules, st.lists(token_id, min_size=1, max_size=8))
def test_rules_make_no_token_of_what_is_no_score(
    logits_V: Tensor, fields: dict[str, Any], ruled: dict[str, Any], tokens: list[int]
) -> None:
    run = ruled_run(fields, ruled, tokens)
    [made] = sample(logits_V[None], [run])
    [drafted] = draft(logits_V[None], [run])
    if isinstance(made, Failed):
        assert isinstance(made.error, RowFailed)
        assert made.is_of_model == (not is_known(logits_V))
        assert isinstance(drafted, Failed)
    else:
        assert is_known(logits_V)
        assert logits_V[made.tokens[0]] > -math.inf
        assert drafted == made.tokens[0]


def ruled_run(fields: dict[str, Any], ruled: dict[str, Any], tokens: list[int]) -> Run:
    sampling = SamplingParams(8, **fields, **ruled)
    request = DecodeRequest("r", tuple(tokens), 1, sampling, (), "")
    return Run(sampling, len(tokens), LogitsProcessor.make(request, tokens, (VOCAB_SIZE - 1,)))


def test_a_score_beyond_float32_is_no_score() -> None:
    """What the penalty that killed workers did, as far as its bounds allow it now."""
    run = ruled_run({"temperature": 1.0}, {"repetition_penalty": 0.01}, [2])
    [made] = sample(torch.full((1, VOCAB_SIZE), 1e37), [run])
    assert isinstance(made, Failed)
    assert "sampling rules leave no score" in str(made.error)
    assert not made.is_of_model


def test_the_best_of_rows_is_known_where_all_are_scores() -> None:
    rows = torch.zeros(5, VOCAB_SIZE)
    rows[0, 3] = rows[0, 5] = 1.0
    rows[1, 4] = math.nan
    rows[2, 4] = math.inf
    rows[3] = -math.inf
    rows[4, :6] = -math.inf
    assert best_tokens(rows) == [3, None, None, None, 6]
    assert best_tokens(rows.bfloat16()) == [3, None, None, None, 6]


def test_what_is_not_reached_of_a_run_does_not_matter() -> None:
    """After a draft that does not hold the scores are those of another text."""
    rows = torch.zeros(3, VOCAB_SIZE)
    rows[0, 3] = 1.0
    rows[1, 4] = 1.0
    rows[2] = math.nan
    greedy = SamplingParams(8, temperature=0)
    assert sample(rows, [Run(greedy, 1, drafts=(3, 5))]) == [Sampled([3, 4])]
    [reached] = sample(rows, [Run(greedy, 1, drafts=(3, 4))])
    assert isinstance(reached, Failed)


@pytest.mark.parametrize("error", [ValueError("bad"), InvalidArgument("grammar", "x", "y")])
def test_a_processor_that_raises_fails_its_own_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = ruled_run({"temperature": 1.0}, {"presence_penalty": 1.0}, [2])
    assert run.processor is not None

    def fail(*arguments: object) -> Tensor:
        raise error

    monkeypatch.setattr(run.processor, "process", fail)
    other = Run(SamplingParams(8, temperature=0), 1)
    bad, good = sample(torch.eye(VOCAB_SIZE)[[1, 2]], [run, other])
    assert good == Sampled([2])
    assert isinstance(bad, Failed)
    assert bad.error is error or bad.error.__cause__ is error
