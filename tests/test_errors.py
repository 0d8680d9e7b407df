"""Messages of errors: whatever callers sent, they are short, can be encoded, and cost nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.errors import MAX_MESSAGE, InvalidArgument

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)
_ANY_TEXT = st.text(st.characters(codec=None))


@given(field=_ANY_TEXT, value=_VALUES | _ANY_TEXT, allowed=_ANY_TEXT)
def test_any_value_can_be_told(field: str, value: object, allowed: str) -> None:
    error = InvalidArgument(field, value, allowed)
    assert json.loads(json.dumps(str(error), ensure_ascii=False).encode("utf-8"))
    assert error.field.encode("utf-8").startswith(field[:8].encode("utf-8", "backslashreplace"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        ("a", "'a'"),
        ("a" * 200, "'" + "a" * 120 + "'… (200 characters)"),
        (2**64, str(2**64)),
        (10**5000, "an integer of 16610 bits"),
        ([1, 2], "[1, 2]"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        (None, "None"),
    ],
    ids=["float", "text", "long", "integer", "huge", "list", "long_list", "none"],
)
def test_values_are_shown_as_they_were_sent(value: object, shown: str) -> None:
    message = str(InvalidArgument("field", value, "less"))
    assert message == f"field: {shown} is not allowed; allowed: less"


def test_messages_are_short() -> None:
    large = [["x" * 10**4] * 100] * 100
    assert len(str(InvalidArgument("f" * 10**6, large, "a" * 10**6))) < 2 * MAX_MESSAGE
