"""Codecs of keys and values: raw to the bit, the others to a stated error; sizes as announced."""

from __future__ import annotations

import pytest
import torch

from colm_serve.core import KvLayout
from colm_serve.errors import InvalidArgument
from colm_serve.transport.codecs import CODECS, GROUP_TOKENS, get_codec

LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float32")
LOSSY = ("bf16", "int8", "fp8")


def make_kv(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Keys with channels a thousand times larger than others, values with such tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    k_SNH, v_SNH = torch.randn(2, num_tokens, 3, 8, generator=generator)
    k_SNH *= torch.logspace(-1, 2, 8)
    v_SNH *= torch.logspace(-1, 2, num_tokens)[:, None, None]
    return k_SNH.to(dtype), v_SNH.to(dtype)


def there_and_back(
    name: str, k_SNH: torch.Tensor, v_SNH: torch.Tensor, layout: KvLayout = LAYOUT
) -> tuple[torch.Tensor, torch.Tensor]:
    codec = CODECS[name]
    payload = b"".join(codec.encode(k_SNH, v_SNH))
    assert len(payload) == codec.num_bytes(layout, len(k_SNH))
    # An odd offset, as in a message where a header of any length stands before the payload.
    received = memoryview(b"x" + payload)[1:]
    return codec.decode(received, layout, len(k_SNH))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_raw_keeps_every_bit(dtype: str, num_tokens: int) -> None:
    layout = KvLayout(2, 3, 8, dtype)
    k, v = make_kv(num_tokens, getattr(torch, dtype))
    k[0, 0, 0], k[0, 0, 1] = torch.nan, torch.inf
    k_back, v_back = there_and_back("raw", k, v, layout)
    assert k_back.dtype == k.dtype
    assert torch.equal(k_back.view(torch.uint8), k.view(torch.uint8))
    assert torch.equal(v_back, v)


def test_raw_is_sent_from_where_it_stands() -> None:
    k, v = make_kv(4)
    part, _ = CODECS["raw"].encode(k, v)
    k[0, 0, 0] = 7.0
    assert torch.frombuffer(part, dtype=torch.float32)[0] == 7.0


def per_channel_and_group(k_SNH: torch.Tensor) -> torch.Tensor:
    """The largest of each channel in each group of tokens, in the place of every number."""
    groups = k_SNH.abs().split(GROUP_TOKENS)
    return torch.cat([group.amax(0, keepdim=True).expand_as(group) for group in groups])


def per_head(x_SNH: torch.Tensor) -> torch.Tensor:
    return x_SNH.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 48, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_bounded_by_what_shares_a_scale(num_tokens: int, dtype: torch.dtype) -> None:
    """A scale is rounded to 8 bits; then comes half a step of int8, or of fp8's 4 bits."""
    k, v = (x.float() for x in make_kv(num_tokens, dtype))
    bound = {
        "bf16": (k.abs() / 256, v.abs() / 256),
        "int8": (per_channel_and_group(k) / 126, per_head(v) / 126),
        "fp8": (
            k.abs() / 16 + per_head(k) / 2**17, v.abs() / 16 + per_head(v) / 2**17,
        ),
    }  # fmt: skip
    for name, (k_bound, v_bound) in bound.items():
        k_back, v_back = there_and_back(name, k, v)
        assert ((k_back - k).abs() <= k_bound).all(), name
        assert ((v_back - v).abs() <= v_bound).all(), name


def test_fp8_is_torchs() -> None:
    """Every one of its finite numbers, told by whose scale is 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    x_SNH = numbers[:, None, None].expand(-1, 3, 8).clone()
    x_SNH[:, :, 0] = 448.0
    k, v = there_and_back("fp8", x_SNH, -x_SNH)
    assert torch.equal(k, x_SNH)
    assert torch.equal(v, -x_SNH)


@pytest.mark.parametrize("name", LOSSY)
def test_the_extremes(name: str) -> None:
    k, v = torch.zeros(2, 20, 3, 8)
    assert not any(x.any() for x in there_and_back(name, k, v)), "zeros stay zeros"
    k, v = torch.full((20, 3, 8), 1e38), torch.full((20, 3, 8), 1e-44)
    k_back, v_back = there_and_back(name, k, v)
    torch.testing.assert_close(k_back.float(), k, rtol=0.01, atol=0)
    assert v_back.abs().max() < 1e-30, "too small for a scale: zero, or as it was"
    k[3, 1, 2] = torch.nan
    assert there_and_back(name, k, v)[0][3, 1, 2].isnan(), "a NaN does not become a number"


def test_smaller_codecs_come_later() -> None:
    sizes = [codec.num_bytes(LAYOUT, 64) for codec in CODECS.values()]
    assert list(CODECS) == ["raw", "bf16", "int8", "fp8"]
    assert sizes[1] == sizes[0] / 2
    assert max(sizes[2:]) < 0.4 * sizes[0]


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(InvalidArgument, match="codec: 'zip' is not allowed; allowed: raw, bf16"):
        get_codec("zip")
