"""KV frames: the bytes protobuf would make, and no damage that goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_serve.errors import DataLoss
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport.kv_frames import EndFrame, KvFrame, decode, encode_end, encode_kv

counts = st.integers(0, 2**40)
payloads = st.one_of(st.binary(max_size=300), st.just(b"\xff" * 70_000))


def readable(frame: KvFrame | EndFrame) -> KvFrame | EndFrame:
    """With the payload as bytes, which compare by value."""
    return frame if isinstance(frame, EndFrame) else replace(frame, payload=bytes(frame.payload))


@given(counts, counts, counts, counts, payloads)
def test_kv_frames_are_protobufs_bytes_and_come_back(
    sequence: int, layer: int, start: int, num_tokens: int, payload: bytes
) -> None:
    half = len(payload) // 2
    parts = [memoryview(payload)[:half], memoryview(payload)[half:]]
    message = encode_kv(sequence, layer, start, num_tokens, parts)
    parsed = prefill_pb2.KvFrame.FromString(message)
    assert parsed.payload == payload
    again = prefill_pb2.KvFrame(header=parsed.header, payload=payload)
    assert again.SerializeToString() == message
    frame = decode(message, sequence)
    assert readable(frame) == KvFrame(sequence, layer, start, num_tokens, payload)


@given(counts, counts, st.floats(0, 1e6))
def test_end_frames_are_protobufs_bytes_and_come_back(
    sequence: int, num_frames: int, compute_s: float
) -> None:
    message = encode_end(sequence, num_frames, compute_s)
    parsed = prefill_pb2.KvFrame.FromString(message)
    assert prefill_pb2.KvFrame(header=parsed.header).SerializeToString() == message
    assert decode(message, sequence) == EndFrame(sequence, num_frames, compute_s)


def test_a_payload_is_read_in_place() -> None:
    message = encode_kv(0, 0, 0, 1, [b"12345678"])
    frame = decode(message, 0)
    assert isinstance(frame, KvFrame)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is message


def decode_or_data_loss(message: bytes, sequence: int) -> KvFrame | EndFrame | None:
    try:
        return readable(decode(message, sequence))
    except DataLoss:
        return None


@given(st.binary(max_size=200), st.integers(0, 3))
@example(b"", 0)
@example(b"\x0a", 0)
@example(b"\x0a" + b"\xff" * 20, 0)
@example(b"\x0a\x01\xc0", 0)
@example(b"\x12\x00\x0a\x01\x80", 0)
def test_any_bytes_are_a_frame_or_data_loss(message: bytes, sequence: int) -> None:
    decode_or_data_loss(message, sequence)


VALID = [encode_kv(2, 1, 16, 4, [b"k" * 40, b"v" * 40]), encode_end(2, 2, 0.25)]


@given(st.sampled_from(VALID), st.data())
def test_a_damaged_frame_is_data_loss_or_unchanged(valid: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(valid) - 1))
    damages: list[Callable[[], bytes]] = [
        lambda: valid[:at] + bytes([data.draw(st.integers(0, 255))]) + valid[at + 1 :],
        lambda: valid[:at],
        lambda: valid[:at] + data.draw(st.binary(max_size=4)) + valid[at:],
        lambda: valid[:at] + valid[at + data.draw(st.integers(1, 4)) :],
    ]
    frame = decode_or_data_loss(data.draw(st.sampled_from(damages))(), 2)
    assert frame is None or frame == readable(decode(valid, 2))


def test_every_single_flipped_bit_is_seen() -> None:
    """Not only in the payload: a frame that names another layer would be as wrong."""
    for valid in VALID:
        original = readable(decode(valid, 2))
        for at in range(len(valid)):
            for bit in range(8):
                damaged = bytearray(valid)
                damaged[at] ^= 1 << bit
                assert decode_or_data_loss(bytes(damaged), 2) in (None, original)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.floats(), st.binary()
)
headers = st.dictionaries(
    st.sampled_from(["seq", "layer", "start", "tokens", "codec", "xxh3", "end", "frames"]),
    st.one_of(scalars, st.lists(scalars, max_size=2)),
)


@given(st.one_of(headers, scalars, st.lists(scalars)))
def test_any_header_is_a_frame_or_data_loss(header: Any) -> None:
    packed = msgpack.packb(header)
    message = prefill_pb2.KvFrame(header=packed, payload=b"abc").SerializeToString()
    assert decode_or_data_loss(message, 0) is None


def test_a_deeply_nested_header_is_data_loss() -> None:
    message = prefill_pb2.KvFrame(header=b"\x91" * 5000 + b"\xc0").SerializeToString()
    with pytest.raises(DataLoss, match="unreadable header"):
        decode(message, 0)


def test_a_frame_out_of_order_is_refused() -> None:
    with pytest.raises(DataLoss, match="KV frame 4: got frame 2 in its place"):
        decode(VALID[0], 4)


def test_a_payload_that_differs_from_its_digest_is_refused() -> None:
    with pytest.raises(DataLoss, match="does not match its digest"):
        decode(VALID[0][:-1] + b"w", 2)


def test_an_unknown_codec_is_refused() -> None:
    header = {"seq": 0, "layer": 0, "start": 0, "tokens": 1, "codec": "zip", "xxh3": 0}
    message = prefill_pb2.KvFrame(header=msgpack.packb(header)).SerializeToString()
    with pytest.raises(DataLoss, match="unknown codec 'zip'"):
        decode(message, 0)
