"""What sampling parameters may be, said in one place for every API."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import FLOAT_FIELDS, SamplingParams, as_written
from colm_serve.errors import InvalidArgument

NAN = math.nan

GOOD: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1e-9}, {"top_p": 1}, {"top_k": 0},
    {"min_p": 0}, {"min_p": 1}, {"repetition_penalty": 0.01}, {"repetition_penalty": 2},
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


#: The least and the most of each float.
BORDERS = {
    "temperature": (0, 2), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 2),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip


def with_field(field: str, value: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, field: value})


@pytest.mark.parametrize("field", FLOAT_FIELDS)
def test_borders_are_those_of_the_number_that_the_wire_carries(field: str) -> None:
    for border, beyond in zip(BORDERS[field], (-math.inf, math.inf), strict=True):
        carried = np.float32(border)
        # A double that rounds to the border is the border.
        for value in (border, float(carried), float(np.nextafter(border, beyond))):
            assert getattr(with_field(field, value), field) == float(carried)
        first_bad = float(np.nextafter(carried, np.float32(beyond)))
        with pytest.raises(InvalidArgument, match=field):
            with_field(field, first_bad)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("top_p", 1e-50, "top_p: 1e-50 is not allowed; allowed: 1e-09 to 1"),
        ("repetition_penalty", 1e-50, "repetition_penalty: 1e-50 is not allowed; allowed: 0.01"),
        ("repetition_penalty", 1e-38, "repetition_penalty: 1e-38 is not allowed; allowed: 0.01"),
        ("presence_penalty", 1e300, "presence_penalty: 1e+300 is not allowed; allowed: -2 to 2"),
        ("temperature", 10**400, "temperature: an integer of 1329 bits is not allowed"),
        ("min_p", -math.inf, "min_p: -inf is not allowed; allowed: 0 to 1"),
        ("logit_bias", ((3, 1e300),), "logit_bias[3]: 1e+300 is not allowed; allowed: -100 to"),
        ("top_k", 2**31, "top_k: 2147483648 is not allowed"),
        ("max_tokens", 2**40, "max_tokens: 1099511627776 is not allowed"),
        ("min_tokens", 10**400, "min_tokens: an integer of 1329 bits is not allowed"),
    ],
)
def test_the_number_that_was_sent_is_shown(field: str, value: Any, shown: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        with_field(field, value)
    assert str(caught.value).startswith(shown)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-50, 1e-45, 1e-38, 9.99e-6])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    assert SamplingParams(8, temperature=temperature).temperature == 0


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 0.01])
def test_a_low_temperature_stays(temperature: float) -> None:
    assert SamplingParams(8, temperature=temperature).temperature == np.float32(temperature)


@given(st.floats(width=32))
def test_what_was_written_is_the_shortest_number_that_is_carried_so(carried: float) -> None:
    written = as_written(carried)
    assert np.float32(written) == np.float32(carried) or math.isnan(carried)
    assert len(repr(written)) <= len(repr(carried))


@given(st.decimals(-100, 100, places=3))
def test_a_short_number_is_known_again(number: Any) -> None:
    assert as_written(float(np.float32(float(number)))) == float(number)


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
