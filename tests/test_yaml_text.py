from __future__ import annotations

import pytest

from colm_serve.yaml_text import parse_yaml


@pytest.mark.parametrize("text", ["1e-5", "1e-05", "1E-5", "1.e-5", "1.0e-5", "10e-6", "+1e-5"])
def test_a_number_with_an_exponent_is_a_number(text: str) -> None:
    assert parse_yaml(f"rms_norm_eps: {text}") == {"rms_norm_eps": pytest.approx(1e-5)}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "x1e5", "'1e5'"])
def test_a_text_stays_a_text(text: str) -> None:
    assert parse_yaml(text) == text.strip("'")
