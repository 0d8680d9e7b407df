"""How keys and values are written down for the wire: as they are, or smaller and a little off.

raw keeps every bit. bf16 rounds. int8 scales K by head channel and group of tokens, since a few
channels are far larger than the others, and V by token and head. fp8 (e4m3) scales both by token
and head. A payload is K's parts, then V's: numbers [num_tokens, num_kv_heads, head_dim], then
bf16 scales, if any.

Shapes: S tokens, N kv heads, H head dim, G groups of tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colm_serve.core import KvLayout
from colm_serve.errors import InvalidArgument

# Payloads are read in place from the immutable bytes they arrived in; nothing writes to them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

#: Tokens of a frame that share the scales of their K.
GROUP_TOKENS = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INT8_MAX = 127.0
_FP8_MAX = 448.0
#: Below it everything counts as zero: a scale that bf16 can hold.
_MIN_SCALE = 2.0**-120
_Part = tuple[torch.dtype, tuple[int, ...]]


class _TensorCodec(Protocol):
    """Writes down one of K and V as tensors of dtypes and shapes that both sides know."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]: ...

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, *parts: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Codec:
    """One way to write down K and V."""

    k: _TensorCodec
    v: _TensorCodec

    def num_bytes(self, layout: KvLayout, num_tokens: int) -> int:
        """Of the payload of a frame of so many tokens."""
        return sum(_num_bytes(part) for part in self._parts(layout, num_tokens))

    def encode(self, k_SNH: Tensor, v_SNH: Tensor) -> list[memoryview]:
        """The payload in parts: views of the tensors where possible."""
        return [_bytes_of(part) for part in (*self.k.encode(k_SNH), *self.v.encode(v_SNH))]

    def decode(
        self, payload: memoryview, layout: KvLayout, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """K and V, each [S, N, H], of a payload of `num_bytes`; of raw ones a view."""
        parts = list(_split(payload, self._parts(layout, num_tokens)))
        num_k = len(self.k.parts(layout, num_tokens))
        return self.k.decode(*parts[:num_k]), self.v.decode(*parts[num_k:])

    def _parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        return (*self.k.parts(layout, num_tokens), *self.v.parts(layout, num_tokens))


class _Raw:
    """Every bit of it."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        return ((_DTYPES[layout.dtype], _shape(layout, num_tokens)),)

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]:
        return (x_SNH,)

    def decode(self, *parts: Tensor) -> Tensor:
        return parts[0]


class _Bf16(_Raw):
    """Rounded to bf16."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        return ((torch.bfloat16, _shape(layout, num_tokens)),)

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]:
        return (x_SNH.to(torch.bfloat16),)


class _Int8ByChannel:
    """One scale for each head channel and group of tokens."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        num_groups = -(-num_tokens // GROUP_TOKENS)
        return (
            (torch.int8, _shape(layout, num_tokens)),
            (torch.bfloat16, _shape(layout, num_groups)),
        )

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]:
        x_GSNH = _in_groups(x_SNH.float())
        scales_GNH = _scales(x_GSNH.abs().amax(1), _INT8_MAX)
        q_GSNH = (x_GSNH / scales_GNH[:, None].float()).round_().to(torch.int8)
        return q_GSNH.flatten(0, 1)[: len(x_SNH)], scales_GNH

    def decode(self, *parts: Tensor) -> Tensor:
        q_SNH, scales_GNH = parts
        q_GSNH = _in_groups(q_SNH)
        return (q_GSNH * scales_GNH[:, None].float()).flatten(0, 1)[: len(q_SNH)]


class _Int8ByHead:
    """One scale for each token and head."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        shape = _shape(layout, num_tokens)
        return (torch.int8, shape), (torch.bfloat16, (*shape[:2], 1))

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]:
        x_SNH = x_SNH.float()
        scales_SN1 = _scales(x_SNH.abs().amax(-1, keepdim=True), _INT8_MAX)
        return (x_SNH / scales_SN1.float()).round_().to(torch.int8), scales_SN1

    def decode(self, *parts: Tensor) -> Tensor:
        q_SNH, scales_SN1 = parts
        return q_SNH * scales_SN1.float()


class _Fp8ByHead:
    """e4m3 with one scale for each token and head."""

    def parts(self, layout: KvLayout, num_tokens: int) -> tuple[_Part, ...]:
        shape = _shape(layout, num_tokens)
        return (torch.int8, shape), (torch.bfloat16, (*shape[:2], 1))

    def encode(self, x_SNH: Tensor) -> tuple[Tensor, ...]:
        x_SNH = x_SNH.float()
        scales_SN1 = _scales(x_SNH.abs().amax(-1, keepdim=True), _FP8_MAX)
        q_SNH = (x_SNH / scales_SN1.float()).to(torch.float8_e4m3fn)
        return q_SNH.view(torch.int8), scales_SN1

    def decode(self, *parts: Tensor) -> Tensor:
        # Ten times as fast as torch's conversion. Sign, exponent and fraction move to where fp32
        # has them; its exponent counts from 120 lower. NaN is not told: its scale is NaN as well.
        q_SNH, scales_SN1 = parts
        bits_SNH = q_SNH.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(-0x78100000)
        return bits_SNH.view(torch.float32).mul_(2.0**120).mul_(scales_SN1.float())


#: By name, from the mildest on: those further down are smaller, or of the same size and worse.
CODECS: dict[str, Codec] = {
    "raw": Codec(_Raw(), _Raw()),
    "bf16": Codec(_Bf16(), _Bf16()),
    "int8": Codec(_Int8ByChannel(), _Int8ByHead()),
    "fp8": Codec(_Fp8ByHead(), _Fp8ByHead()),
}


def get_codec(name: str) -> Codec:
    """The codec of this name; raises InvalidArgument, naming the field `codec`, if none has it."""
    if name not in CODECS:
        raise InvalidArgument("codec", name, ", ".join(CODECS))
    return CODECS[name]


def _scales(largest: Tensor, target: float) -> Tensor:
    return (largest / target).clamp_min_(_MIN_SCALE).to(torch.bfloat16)


def _in_groups(x_SNH: Tensor) -> Tensor:
    """[G, GROUP_TOKENS, N, H]; zeros stand in for tokens that the last group lacks."""
    num_lacking = -len(x_SNH) % GROUP_TOKENS
    if num_lacking:
        x_SNH = torch.cat([x_SNH, x_SNH.new_zeros(num_lacking, *x_SNH.shape[1:])])
    return x_SNH.view(-1, GROUP_TOKENS, *x_SNH.shape[1:])


def _shape(layout: KvLayout, num_tokens: int) -> tuple[int, int, int]:
    return num_tokens, layout.num_kv_heads, layout.head_dim


def _num_bytes(part: _Part) -> int:
    dtype, shape = part
    return dtype.itemsize * math.prod(shape)


def _split(payload: memoryview, parts: Sequence[_Part]) -> Iterator[Tensor]:
    at = 0
    for part in parts:
        dtype, shape = part
        # Cut by bytes: parts need not be aligned to what they hold.
        size = _num_bytes(part)
        raw = torch.frombuffer(payload[at : at + size], dtype=torch.uint8)
        yield raw.view(dtype).view(shape)
        at += size


def _bytes_of(tensor: Tensor) -> memoryview:
    host = tensor.contiguous().cpu()
    return memoryview(host.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
