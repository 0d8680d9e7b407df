"""What sampling parameters may be, said in one place for every API."""

from __future__ import annotations

import math
from typing import Any

import pytest

from colm_serve.core import SamplingParams
from colm_serve.errors import InvalidArgument

NAN = math.nan

GOOD: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1e-9}, {"top_p": 1}, {"top_k": 0},
    {"min_p": 0}, {"min_p": 1}, {"repetition_penalty": 1e-9}, {"repetition_penalty": 2},
    {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": -2},
    {"frequency_penalty": 2}, {"logit_bias": tuple((i, 100.0) for i in range(300))},
    {"logit_bias": ((0, -100.0),)}, {"stop_token_ids": tuple(range(64))}, {"min_tokens": 8},
    {"logprobs": None}, {"logprobs": 0}, {"logprobs": 20}, {"seed": 2**64 - 1},
]  # fmt: skip

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", NAN), ("top_p", 0),
    ("top_p", 1.1), ("top_p", NAN), ("top_k", -1), ("min_p", -0.1), ("min_p", 1.1),
    ("min_p", NAN), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("repetition_penalty", 2.1), ("repetition_penalty", NAN), ("presence_penalty", -2.1),
    ("presence_penalty", 2.1), ("presence_penalty", NAN), ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1), ("frequency_penalty", NAN), ("min_tokens", -1),
    ("min_tokens", 9), ("max_tokens", 0), ("logprobs", -1), ("logprobs", 21), ("seed", -1),
    ("seed", 2**64), ("stop_token_ids", tuple(range(65))),
    ("logit_bias", tuple((i, 1.0) for i in range(301))), ("logit_bias", ((3, 100.5),)),
    ("logit_bias", ((3, -101.0),)), ("logit_bias", ((3, NAN),)),
]  # fmt: skip


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_the_bounds_are_allowed(fields: dict[str, Any]) -> None:
    SamplingParams(**{"max_tokens": 8, **fields})


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: str(value)[:20])
def test_what_is_beyond_them_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="allowed") as caught:
        SamplingParams(**{"max_tokens": 8, field: value})
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("stop_token_ids", {"stop_token_ids": (1, 10)}),
        ("stop_token_ids", {"stop_token_ids": (-1,)}),
        ("logit_bias", {"logit_bias": ((10, 1.0),)}),
        ("logit_bias", {"logit_bias": ((-1, 1.0),)}),
        ("min_tokens", {"stop_token_ids": tuple(range(9)), "min_tokens": 1}),
    ],
)
def test_tokens_that_the_model_lacks_are_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(max_tokens=8, **fields).check_vocabulary(10, (9,))
    assert caught.value.field == field


def test_a_vocabulary_that_has_all_of_them_is_fine() -> None:
    sampling = SamplingParams(
        8, stop_token_ids=tuple(range(9)), min_tokens=1, logit_bias=((9, 1.0),), ignore_eos=True
    )
    sampling.check_vocabulary(10, (9,))


def test_what_ends_a_text() -> None:
    assert SamplingParams(1).ending_token_ids((5, 6)) == {5, 6}
    assert SamplingParams(1, stop_token_ids=(7,)).ending_token_ids((5,)) == {5, 7}
    assert SamplingParams(1, stop_token_ids=(7,), ignore_eos=True).ending_token_ids((5,)) == {7}
