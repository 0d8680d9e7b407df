"""How the router and the processes that read for it call each other: bytes, read as data."""

from __future__ import annotations

from typing import Any

import msgpack

from colm_serve.errors import ColmError, InvalidArgument, RequestTooLarge, UnknownModel

_ERRORS = {kind.__name__: kind for kind in (InvalidArgument, RequestTooLarge, UnknownModel)}


def pack_call(what: str, *arguments: Any) -> bytes:
    return bytes(msgpack.packb([what, *arguments]))


def unpack_call(data: bytes) -> tuple[str, list[Any]]:
    what, *arguments = msgpack.unpackb(data)
    return what, arguments


def pack_answer(value: bytes) -> bytes:
    return bytes(msgpack.packb([value, None]))


def pack_error(error: InvalidArgument) -> bytes:
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    return bytes(msgpack.packb([b"", [name, error.field, error.allowed, str(error)]]))


def unpack_answer(data: bytes) -> bytes:
    """Raises the InvalidArgument that the other side raised."""
    value, error = msgpack.unpackb(data)
    if error is None:
        return bytes(value)
    name, field, allowed, message = error
    told = _ERRORS[name].__new__(_ERRORS[name])
    ColmError.__init__(told, message)
    told.field, told.allowed = field, allowed
    raise told
