"""KV frames: the bytes protobuf would make, and no damage that goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from colm_serve.core import KvLayout
from colm_serve.errors import DataLoss
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport.kv_frames import (
    EndFrame,
    Frame,
    KvFrame,
    OpenFrame,
    Progress,
    WaitFrame,
    decode,
    encode,
)

STREAM = 2**63 + 5
counts = st.integers(0, 2**64 - 1)
amounts = st.floats(0, 1e300)
names = st.text(max_size=70)
layouts = st.builds(KvLayout, counts, counts, counts, names)
payloads = st.one_of(st.binary(max_size=300), st.just(b"\xff" * 70_000))
frames = st.one_of(
    st.builds(OpenFrame, counts, counts, names, layouts, names, names, counts, counts, amounts),
    st.builds(KvFrame, counts, counts, counts, counts),
    st.builds(WaitFrame, counts, st.none() | st.builds(Progress, counts, counts, amounts)),
    st.builds(EndFrame, counts, amounts),
)


@given(frames, counts, payloads)
def test_frames_are_protobufs_bytes_and_come_back(
    frame: Frame, stream_id: int, payload: bytes
) -> None:
    half = len(payload) // 2
    parts = [memoryview(payload)[:half], memoryview(payload)[half:]]
    message = encode(frame, stream_id, parts)
    parsed = prefill_pb2.KvFrame.FromString(message)
    assert parsed.payload == payload
    assert parsed.digest == xxhash.xxh3_64_intdigest(parsed.header + payload, seed=stream_id)
    again = prefill_pb2.KvFrame(header=parsed.header, payload=payload, digest=parsed.digest)
    assert again.SerializeToString() == message
    got, got_payload = decode(message, stream_id, frame.sequence)
    assert (got, bytes(got_payload)) == (frame, payload)


def test_a_payload_is_read_in_place() -> None:
    message = encode(KvFrame(0, 0, 0, 1), STREAM, [b"12345678"])
    _, payload = decode(message, STREAM, 0)
    assert payload.obj is message


def decode_or_data_loss(message: bytes, sequence: int) -> tuple[Frame, bytes] | None:
    try:
        frame, payload = decode(message, STREAM, sequence)
    except DataLoss:
        return None
    return frame, bytes(payload)


@given(st.binary(max_size=200), st.integers(0, 3))
@example(b"", 0)
@example(b"\x0a", 0)
@example(b"\x0a" + b"\xff" * 20, 0)
@example(b"\x0a\x01\xc0", 0)
@example(b"\x12\x00\x0a\x01\x80", 0)
@example(b"\x19\x00", 0)
def test_any_bytes_are_a_frame_or_data_loss(message: bytes, sequence: int) -> None:
    decode_or_data_loss(message, sequence)


LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32")
VALID: list[tuple[Frame, list[bytes]]] = [
    (OpenFrame(2, 9, "weights", LAYOUT, "raw", "message", 0, 30, 1000.0), []),
    (KvFrame(2, 1, 16, 4), [b"k" * 40, b"v" * 40]),
    (WaitFrame(2, Progress(64, 500, 1000.0)), []),
    (EndFrame(2, 0.25), []),
]
MESSAGES = [encode(frame, STREAM, parts) for frame, parts in VALID]


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_frame_is_data_loss_or_unchanged(valid: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(valid) - 1))
    damages: list[Callable[[], bytes]] = [
        lambda: valid[:at] + bytes([data.draw(st.integers(0, 255))]) + valid[at + 1 :],
        lambda: valid[:at],
        lambda: valid[:at] + data.draw(st.binary(max_size=4)) + valid[at:],
        lambda: valid[:at] + valid[at + data.draw(st.integers(1, 4)) :],
    ]
    got = decode_or_data_loss(data.draw(st.sampled_from(damages))(), 2)
    assert got in (None, decode_or_data_loss(valid, 2))


@pytest.mark.parametrize("valid", MESSAGES, ids=["open", "kv", "wait", "end"])
def test_every_single_flipped_bit_is_seen(valid: bytes) -> None:
    """Not only in the payload: a frame that names another layer would be as wrong."""
    for at in range(len(valid)):
        for bit in range(8):
            damaged = bytearray(valid)
            damaged[at] ^= 1 << bit
            assert decode_or_data_loss(bytes(damaged), 2) is None, f"byte {at}, bit {bit}"


def with_header(header: bytes, payload: bytes = b"") -> bytes:
    """A message whose digest is right."""
    digest = xxhash.xxh3_64_intdigest(header + payload, seed=STREAM)
    message = prefill_pb2.KvFrame(header=header, payload=payload, digest=digest)
    return message.SerializeToString()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.floats(), st.binary()
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner))


@given(st.sampled_from(MESSAGES), st.data())
def test_any_other_value_of_a_header_is_a_frame_or_data_loss(
    valid: bytes, data: st.DataObject
) -> None:
    """Well packed, with the right digest: what a peer with a fault of its own would send."""
    header = msgpack.unpackb(prefill_pb2.KvFrame.FromString(valid).header)
    key = data.draw(st.sampled_from([*header, "unknown"]))
    value = header[key] = data.draw(values | st.integers(-(2**63), 2**64 - 1))
    got = decode_or_data_loss(with_header(msgpack.packb(header)), 2)
    if got is not None:
        frame = asdict(got[0])
        assert key == "unknown" or _are_equal(frame.get(key, header["kind"]), value)


def _are_equal(got: object, sent: object) -> bool:
    """But for keys that are not known."""
    if isinstance(got, dict) and isinstance(sent, dict):
        return all(sent[key] == value for key, value in got.items())
    return got == sent


def test_peers_of_other_releases_are_understood() -> None:
    """Of an older one a wait frame says nothing more, of a newer one it says what is not read."""
    old = {"kind": "wait", "sequence": 0}
    assert decode(with_header(msgpack.packb(old)), STREAM, 0)[0] == WaitFrame(0)
    progress = {"num_computed_tokens": 1, "num_queued_tokens": 2, "tokens_per_s": 3.0, "new": [4]}
    new = {"kind": "wait", "sequence": 0, "progress": progress, "newer": 5}
    got, _ = decode(with_header(msgpack.packb(new)), STREAM, 0)
    assert got == WaitFrame(0, Progress(1, 2, 3.0))


@given(values)
def test_any_header_is_a_frame_or_data_loss(header: Any) -> None:
    assert decode_or_data_loss(with_header(msgpack.packb(header), b"abc"), 0) is None


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"\x91" * 5000 + b"\xc0", "unreadable header"),
        (b"\xdd\xff\xff\xff\xff", "unreadable header"),
        (b"\xc1", "unreadable header"),
        (b"\x80\x80", "unreadable header"),
        (b"\x81\x80\x80", "unreadable header"),
        (b"\x81\xa4kind\x90", "no known kind"),
        (msgpack.packb({"kind": "wait"}), "without sequence"),
        (msgpack.packb({"kind": "end", "sequence": 0}), "without compute_s, sequence"),
        (msgpack.packb({"kind": "wait", "sequence": 0, "progress": 1}), "without num_computed"),
        (msgpack.packb({"kind": "wait", "sequence": True}), "sequence is of type bool, not int"),
        (msgpack.packb({"kind": "wait", "sequence": -1}), "sequence is -1"),
        (msgpack.packb({"kind": "end", "sequence": 0, "compute_s": float("nan")}), "is nan"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(header: bytes, why: str) -> None:
    with pytest.raises(DataLoss, match=f"KV frame 0: .*{why}"):
        decode(with_header(header), STREAM, 0)


def test_a_frame_out_of_order_is_refused() -> None:
    with pytest.raises(DataLoss, match="KV frame 4: got frame 2 in its place"):
        decode(MESSAGES[1], STREAM, 4)


def test_a_frame_of_another_stream_is_refused() -> None:
    with pytest.raises(DataLoss, match="damaged or of another stream"):
        decode(MESSAGES[1], STREAM + 1, 2)


def test_truncation_is_named() -> None:
    with pytest.raises(DataLoss, match="truncated: 20 bytes of"):
        decode(MESSAGES[1][:20], STREAM, 2)
