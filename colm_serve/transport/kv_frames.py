"""KV frames: a msgpack header, a raw payload and a digest of both, as the KvFrame message.

The message is written and read by hand (tag, length, header; tag, length, payload; tag, digest):
equal byte for byte to what protobuf would make, without its copies of the payload.

A stream is an opening frame, at once; the frames of every layer of each chunk of tokens, in
order, with wait frames where the worker is busy otherwise; and an end frame. The digest is
seeded with the stream's id, which the receiver chose: frames of other streams do not match.

Peers of different releases understand each other: of a header, what is not known is not read, and
what older ones do not say may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

import msgpack
import xxhash

from colm_serve.core import KvLayout
from colm_serve.errors import DataLoss

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2, length-delimited
_DIGEST_TAG = 0x19  # field 3, 64 bits
_DIGEST_BYTES = 8

Buffer = bytes | bytearray | memoryview

#: Paths of payloads: in the messages, or in the segment that the request names.
MESSAGE, SHARED_MEMORY = "message", "shared_memory"


@dataclass(frozen=True)
class OpenFrame:
    """Who answers, what it will send, and how much work stands before it; always frame 0.

    `num_cached_tokens` of the prompt need no compute, `num_queued_tokens` of other prompts come
    first, and `tokens_per_s` is the worker's measured speed, 0 if unknown.
    """

    sequence: int
    epoch: int
    kv_identity: str
    layout: KvLayout
    codec: str
    path: str
    num_cached_tokens: int
    num_queued_tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class KvFrame:
    """K and V of tokens [start, start + num_tokens) in one layer: the payload.

    It is K then V, each written down as the opening's codec does; see `transport.codecs`.
    """

    sequence: int
    layer: int
    start: int
    num_tokens: int


@dataclass(frozen=True)
class Progress:
    """How far a worker has come: `num_computed_tokens` of the prompt need no compute any more.

    The others are as in the opening.
    """

    num_computed_tokens: int
    num_queued_tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class WaitFrame:
    """Nothing to send yet, but the worker has computed something since the last frame."""

    sequence: int
    progress: Progress | None = None


@dataclass(frozen=True)
class EndFrame:
    """Everything was sent; computing it took `compute_s`."""

    sequence: int
    compute_s: float


Frame = OpenFrame | KvFrame | WaitFrame | EndFrame
_KINDS: dict[str, type[Frame]] = {
    "open": OpenFrame,
    "kv": KvFrame,
    "wait": WaitFrame,
    "end": EndFrame,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_FIELDS: dict[type[Any], dict[str, type]] = {
    kind: {
        name: next((arm for arm in get_args(hint) if arm is not NoneType), hint)
        for name, hint in get_type_hints(kind).items()
    }
    for kind in (*_KINDS.values(), KvLayout, Progress)
}
_REQUIRED = {
    kind: {field.name for field in fields(kind) if field.default is MISSING} for kind in _FIELDS
}


def lane_id(stream_id: int, lane: int) -> int:
    """What the digests of one lane of a stream are seeded with."""
    return (stream_id + lane) % 2**64


def encode(frame: Frame, stream_id: int, parts: Sequence[Buffer] = ()) -> bytes:
    """The wire bytes of a frame whose payload is `parts` one after another."""
    header = msgpack.packb({"kind": _NAMES[type(frame)], **asdict(frame)})
    prefix = bytes([_HEADER_TAG]) + _varint(len(header)) + header
    size = sum(memoryview(part).nbytes for part in parts)
    if size:
        prefix += bytes([_PAYLOAD_TAG]) + _varint(size)
    digest = _digest(stream_id, (header, *parts))
    return b"".join((prefix, *parts, bytes([_DIGEST_TAG]), digest))


def decode(message: bytes, stream_id: int, sequence: int) -> tuple[Frame, memoryview]:
    """Read the message that is to be frame `sequence`; the payload is a view into it.

    Raises:
        DataLoss: damaged, not a frame, of another stream, or out of order.
    """
    try:
        header, payload, digest = _split(memoryview(message))
        if digest != _digest(stream_id, (header, payload)):
            raise ValueError("damaged or of another stream: it does not match its digest")
        frame = _read_header(header)
    except ValueError as error:
        raise DataLoss(f"KV frame {sequence}: {error}") from error
    if frame.sequence != sequence:
        raise DataLoss(f"KV frame {sequence}: got frame {frame.sequence} in its place")
    return frame, payload


def _read_header(header: memoryview) -> Frame:
    try:
        values = msgpack.unpackb(header)
    except ValueError as error:
        raise ValueError(f"unreadable header: {error!r}") from error
    if not isinstance(values, dict) or values.get("kind") not in _NAMES.values():
        raise ValueError("header of no known kind of frame")
    frame: Frame = _typed(_KINDS[values.pop("kind")], values)
    return frame


def _typed(kind: type[Any], values: object) -> Any:
    """A dataclass of strings, counts, amounts and such dataclasses, from a dict."""
    required = _REQUIRED[kind]
    if not isinstance(values, dict) or not required <= values.keys():
        raise ValueError(f"header without {', '.join(sorted(required))}")
    given = {name: values[name] for name in _FIELDS[kind] if name in values}
    return kind(**{name: _field(kind, name, value) for name, value in given.items()})


def _field(owner: type[Any], name: str, value: object) -> Any:
    kind = _FIELDS[owner][name]
    if value is None and name not in _REQUIRED[owner]:
        return None
    if kind in _FIELDS:
        return _typed(kind, value)
    if type(value) is not kind:
        raise ValueError(f"header: {name} is of type {type(value).__name__}, not {kind.__name__}")
    # Written so that NaN fails too.
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ValueError(f"header: {name} is {value}")
    return value


def _digest(stream_id: int, parts: Sequence[Buffer]) -> bytes:
    digest = xxhash.xxh3_64(seed=stream_id)
    for part in parts:
        digest.update(part)
    # Protobuf is little endian, xxhash's digest big endian.
    return bytes(digest.digest()[::-1])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _split(message: memoryview) -> tuple[memoryview, memoryview, memoryview]:
    """Header, payload and digest of a KvFrame message; fields it does not know are refused."""
    nothing = memoryview(b"")
    fields = {_HEADER_TAG: nothing, _PAYLOAD_TAG: nothing, _DIGEST_TAG: nothing}
    at = 0
    while at < len(message):
        tag = message[at]
        if tag not in fields:
            raise ValueError(f"unknown field tag {tag} at byte {at}")
        if tag == _DIGEST_TAG:
            length, at = _DIGEST_BYTES, at + 1
        else:
            length, at = _read_varint(message, at + 1)
        if at + length > len(message):
            raise ValueError(f"truncated: {len(message)} bytes of {at + length}")
        fields[tag] = message[at : at + length]
        at += length
    return fields[_HEADER_TAG], fields[_PAYLOAD_TAG], fields[_DIGEST_TAG]


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 63:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("truncated length")
