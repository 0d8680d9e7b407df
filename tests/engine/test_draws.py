"""Speculated draws follow the model's distribution exactly, and agree with the drafter often."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_serve.core import SamplingParams
from colm_serve.engine import draws
from colm_serve.engine.draws import Purpose, distribution, draw, draw_speculated, uniform
from tests.helpers import p_value

OFF = -math.inf
#: The model's scores and the drafter's.
PAIRS: dict[str, tuple[list[float], list[float]]] = {
    "equal": ([1, 3, 2, 0, 2.5], [1, 3, 2, 0, 2.5]),
    "near": ([1, 3, 2, 0, 2.5], [1.2, 2.7, 2.1, 0.2, 2.4]),
    "turned round": ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]),
    "flat drafter": ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1]),
    "flat model": ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
    "disjoint": ([1, 2, OFF, OFF, OFF], [OFF, OFF, 1, 1, 3]),
    "drafter within the model": ([1, 2, 1.5, 0.5, 2], [OFF, 2, OFF, 1, OFF]),
    "model within the drafter": ([OFF, 2, OFF, 1, OFF], [1, 2, 1.5, 0.5, 2]),
    "sure drafter, wrong": ([2, 1, 1, 1, 0], [0, 0, 0, 0, 30]),
    "sure model": ([30, 0, 0, 0, 0], [0, 1, 2, 1, 0]),
    "all but equal": ([1, 2, 3, 4, 0], [1, 2, 3, 4, 1e-9]),
    "one overlap": ([2, 1, 2, OFF, OFF], [OFF, OFF, 1, 2, 3]),
}
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8, "top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 4, "min_p": 0.05, "top_p": 0.9},
]
NUM_DRAWS = 1500


def pair(name: str, params: SamplingParams) -> tuple[Tensor, Tensor]:
    p_V, q_V = (distribution(torch.tensor(logits), params) for logits in PAIRS[name])
    return p_V, q_V


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_they_follow_the_model_whatever_the_drafter(name: str, filters: dict[str, Any]) -> None:
    params = SamplingParams(1, seed=len(name), **filters)
    p_V, q_V = pair(name, params)
    tokens = [draw_speculated(p_V, q_V, params, i) for i in range(NUM_DRAWS)]
    # 72 cases: all of right draws pass in 99.9 runs of 100, and the seeds are fixed.
    assert p_value(tokens, p_V) > 1e-5


def test_a_draw_from_the_drafter_would_be_noticed() -> None:
    params = SamplingParams(1, seed=3)
    for name in PAIRS.keys() - {"equal", "near", "all but equal"}:
        p_V, q_V = pair(name, params)
        assert p_value([draw(q_V, params, i) for i in range(NUM_DRAWS)], p_V) < 1e-9, name


def test_they_follow_the_model_over_seeds_too() -> None:
    p_V, q_V = pair("near", SamplingParams(1))
    every = [SamplingParams(1, seed=seed) for seed in range(NUM_DRAWS)]
    assert p_value([draw_speculated(p_V, q_V, params, 7) for params in every], p_V) > 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_they_agree_with_the_drafter_as_often_as_any_draw_can(name: str) -> None:
    params = SamplingParams(1, seed=9)
    p_V, q_V = pair(name, params)
    shared = float(torch.minimum(p_V, q_V).sum())
    agree = [draw_speculated(p_V, q_V, params, i) == draw(q_V, params, i) for i in range(NUM_DRAWS)]
    margin = 4.5 * math.sqrt(shared * (1 - shared) / NUM_DRAWS) + 1e-6
    assert sum(agree) / NUM_DRAWS == pytest.approx(shared, abs=margin)


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 99), st.sampled_from(FILTERS))
def test_equal_scores_give_the_plain_draw(seed: int, position: int, filters: Any) -> None:
    params = SamplingParams(1, seed=seed, **filters)
    p_V, q_V = pair("equal", params)
    assert draw_speculated(p_V, q_V, params, position) == draw(p_V, params, position)


def test_what_rounding_takes_from_equal_scores_rejects_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draws, "uniform", lambda *key: 1 - 2.0**-53)
    q_V = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64)
    assert draw_speculated(q_V * (1 - 1e-12), q_V, SamplingParams(1), 0) == 2


@pytest.mark.parametrize("size", [1000, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97, 1 - 1e-12])
def test_top_p_of_a_flat_distribution_is_the_smallest_set(size: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(size)
    logits_V = torch.randn(size, generator=generator)
    p_V = torch.softmax(logits_V.double(), dim=0)
    kept_V = distribution(logits_V, SamplingParams(1, top_p=top_p)) > 0
    assert p_V[kept_V].sum() >= top_p - 1e-12
    assert p_V[kept_V].sum() - p_V[kept_V].min() < top_p
    assert kept_V.all() or p_V[kept_V].min() >= p_V[~kept_V].max()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_is_left_is_a_distribution(filters: dict[str, Any]) -> None:
    logits_V = torch.tensor([1.0, 3.0, OFF, 0.0, 2.5])
    p_V = distribution(logits_V, SamplingParams(1, **filters))
    assert float(p_V.sum()) == pytest.approx(1, abs=1e-12)
    kept = p_V > 0
    assert not kept[2]
    scores = logits_V[kept].double() / filters.get("temperature", 1.0)
    torch.testing.assert_close(p_V[kept], torch.softmax(scores, dim=0))


def test_a_draw_of_the_whole_mass_takes_no_token_without_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounding can bring the number up to the mass itself; masked tokens come after it."""
    monkeypatch.setattr(draws, "uniform", lambda *key: 1.0)
    p_V = distribution(torch.tensor([1.0, OFF, 2.0, OFF]), SamplingParams(1))
    assert draw(p_V, SamplingParams(1), 0) == 2


def test_the_numbers_of_one_position_are_independent() -> None:
    cells = [
        2 * (uniform(5, i, Purpose.TOKEN) < 0.5) + (uniform(5, i, other) < 0.5)
        for other in (Purpose.ACCEPTANCE, Purpose.RESIDUAL)
        for i in range(4000)
    ]
    assert p_value(cells[:4000], torch.full((4,), 0.25)) > 1e-4
    assert p_value(cells[4000:], torch.full((4,), 0.25)) > 1e-4
