"""Chain-of-Linear over oneDNN's packed weights, against the reference."""

from __future__ import annotations

import pytest
import torch

from colm_serve.kernels import dispatch, staircase_linear, staircase_linear_onednn
from tests.kernels.test_staircase_linear import ROWS, make_case

pytestmark = pytest.mark.skipif(
    not staircase_linear_onednn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_give_the_reference_s_result(rows: tuple[int, ...], has_bias: bool) -> None:
    x, weights, biases = make_case(rows, torch.float32)
    packed = [staircase_linear_onednn.pack(weight) for weight in weights]
    # Wider than any weight and poisoned there: a kernel that reads too far gives NaN.
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)
    with torch.no_grad():
        y = dispatch.chain_linear(wide, packed, rows, biases if has_bias else None)
        expected = staircase_linear.staircase_linear(x, weights, rows, biases if has_bias else None)
    assert packed[0].is_mkldnn
    torch.testing.assert_close(y, expected)
