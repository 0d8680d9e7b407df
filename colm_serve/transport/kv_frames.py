"""KV frames: a msgpack header and a raw payload, in the bytes of the KvFrame message.

The message is written and read by hand (tag, length, header; tag, length, payload): equal byte
for byte to what protobuf would make, without its copies of the payload.

A stream is the frames of every layer of each chunk of tokens, in order, then one end frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import xxhash

from colm_serve.errors import DataLoss

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2, length-delimited

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class KvFrame:
    """K and V of tokens [start, start + num_tokens) in one layer.

    `payload` is K then V, each [num_tokens, num_kv_heads, head_dim], little endian.
    """

    sequence: int
    layer: int
    start: int
    num_tokens: int
    payload: Buffer


@dataclass(frozen=True)
class EndFrame:
    """Everything was sent: `num_frames` frames came before this one."""

    sequence: int
    num_frames: int
    compute_s: float


def encode_kv(
    sequence: int, layer: int, start: int, num_tokens: int, parts: Sequence[Buffer]
) -> bytes:
    """The wire bytes of a KV frame whose payload is `parts` one after another."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    header = msgpack.packb(
        {
            "seq": sequence,
            "layer": layer,
            "start": start,
            "tokens": num_tokens,
            "codec": "raw",
            "xxh3": digest.intdigest(),
        }
    )
    return _encode(header, parts)


def encode_end(sequence: int, num_frames: int, compute_s: float) -> bytes:
    """The wire bytes of the frame that ends a stream."""
    header = msgpack.packb(
        {"seq": sequence, "end": True, "frames": num_frames, "compute_s": compute_s}
    )
    return _encode(header, ())


def decode(message: bytes, expected_sequence: int) -> KvFrame | EndFrame:
    """Read one message; the payload is a view into it.

    Raises:
        DataLoss: not a frame, out of order, or the payload does not match its digest.
    """
    header_bytes, payload = _split(memoryview(message))
    try:
        header = msgpack.unpackb(header_bytes)
        sequence = header["seq"]
        if header.get("end"):
            frame: KvFrame | EndFrame = EndFrame(sequence, header["frames"], header["compute_s"])
        else:
            frame = KvFrame(sequence, header["layer"], header["start"], header["tokens"], payload)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataLoss(f"KV frame {expected_sequence}: unreadable header: {error!r}") from error
    if sequence != expected_sequence:
        raise DataLoss(f"KV frame {expected_sequence}: got frame {sequence} in its place")
    if isinstance(frame, KvFrame):
        if header.get("codec") != "raw":
            raise DataLoss(f"KV frame {sequence}: unknown codec {header.get('codec')!r}")
        if header.get("xxh3") != xxhash.xxh3_64_intdigest(payload):
            raise DataLoss(f"KV frame {sequence}: payload does not match its digest")
    return frame


def _encode(header: bytes, parts: Sequence[Buffer]) -> bytes:
    size = sum(memoryview(part).nbytes for part in parts)
    prefix = bytes([_HEADER_TAG]) + _varint(len(header)) + header
    if size:
        prefix += bytes([_PAYLOAD_TAG]) + _varint(size)
    return b"".join((prefix, *parts))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _split(message: memoryview) -> tuple[memoryview, memoryview]:
    """Header and payload of a KvFrame message; fields it does not know are refused."""
    fields = {_HEADER_TAG: memoryview(b""), _PAYLOAD_TAG: memoryview(b"")}
    at = 0
    while at < len(message):
        tag = message[at]
        if tag not in fields:
            raise DataLoss(f"KV frame: unknown field tag {tag} at byte {at}")
        length, at = _read_varint(message, at + 1)
        if at + length > len(message):
            raise DataLoss(f"KV frame: truncated: {len(message)} bytes of {at + length}")
        fields[tag] = message[at : at + length]
        at += length
    return fields[_HEADER_TAG], fields[_PAYLOAD_TAG]


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 63:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise DataLoss("KV frame: truncated length")
