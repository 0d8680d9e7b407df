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

_KV_KINDS = {"seq": int, "layer": int, "start": int, "tokens": int, "codec": str, "xxh3": int}
_END_KINDS = {"seq": int, "frames": int, "compute_s": float, "xxh3": int}

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
    header = msgpack.packb(
        {
            "seq": sequence,
            "layer": layer,
            "start": start,
            "tokens": num_tokens,
            "codec": "raw",
            "xxh3": _digest((sequence, layer, start, num_tokens), parts),
        }
    )
    return _encode(header, parts)


def encode_end(sequence: int, num_frames: int, compute_s: float) -> bytes:
    """The wire bytes of the frame that ends a stream."""
    header = msgpack.packb(
        {
            "seq": sequence,
            "end": True,
            "frames": num_frames,
            "compute_s": compute_s,
            "xxh3": _digest((sequence, num_frames, compute_s), ()),
        }
    )
    return _encode(header, ())


def decode(message: bytes, expected_sequence: int) -> KvFrame | EndFrame:
    """Read one message; the payload is a view into it.

    Raises:
        DataLoss: not a frame, out of order, or not what its digest was made of.
    """
    header_bytes, payload = _split(memoryview(message))
    frame, digest = _read_header(header_bytes, payload, expected_sequence)
    if frame.sequence != expected_sequence:
        raise DataLoss(f"KV frame {expected_sequence}: got frame {frame.sequence} in its place")
    if isinstance(frame, EndFrame):
        values: tuple[int | float, ...] = (frame.sequence, frame.num_frames, frame.compute_s)
    else:
        values = (frame.sequence, frame.layer, frame.start, frame.num_tokens)
    if digest != _digest(values, (payload,)):
        raise DataLoss(f"KV frame {frame.sequence}: it does not match its digest")
    return frame


def _read_header(
    header_bytes: memoryview, payload: memoryview, expected_sequence: int
) -> tuple[KvFrame | EndFrame, int]:
    try:
        header = msgpack.unpackb(header_bytes)
        kinds = _END_KINDS if header.get("end") else _KV_KINDS
        for key, kind in kinds.items():
            if type(header[key]) is not kind:
                raise TypeError(f"{key} is {header[key]!r}, not of type {kind.__name__}")
        sequence, digest = header["seq"], header["xxh3"]
        if header.get("end"):
            return EndFrame(sequence, header["frames"], header["compute_s"]), digest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataLoss(f"KV frame {expected_sequence}: unreadable header: {error!r}") from error
    if header["codec"] != "raw":
        raise DataLoss(f"KV frame {sequence}: unknown codec {header['codec']!r}")
    return KvFrame(sequence, header["layer"], header["start"], header["tokens"], payload), digest


def _digest(values: tuple[int | float, ...], parts: Sequence[Buffer]) -> int:
    """Of the payload and of what the header says about it: neither can change unseen."""
    digest = xxhash.xxh3_64(repr(values).encode())
    for part in parts:
        digest.update(part)
    return digest.intdigest()


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
