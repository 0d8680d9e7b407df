"""The one exception tree.

    ColmError
    ├── InvalidArgument      the caller sent something that can never work
    │   ├── UnknownModel
    │   ├── UnknownRequest   no such request is under way any more
    │   └── RequestTooLarge  it is more than is looked at
    ├── InvalidConfig        a config file or model config is wrong
    ├── CheckpointError      a model folder is missing, truncated or foreign
    ├── WriteFailed          a file or folder cannot be written, as on a full disk
    ├── Incompatible         two workers do not hold the same weights or layout
    ├── Unauthenticated      the caller has no API key, or an unknown one
    ├── ResourceExhausted    there is no room now; try again later
    │   ├── TargetsMissed    there is room, but not for its or others' targets
    │   └── RateLimited      a tenant has used up what it may have
    ├── Unavailable          the peer is gone or draining
    ├── DataLoss             bytes arrived damaged or not at all
    ├── DeadlineExceeded     a wait ran past its bound
    ├── RowFailed            one request's own computation failed; others go on
    └── WorkerFailed         a worker failed at a request for a reason of its own

The gRPC status of each is given in `transport.status`, the HTTP status in `router.openai.errors`.
What callers have sent stands in messages cut short, and as text that can be encoded.
"""

import reprlib

#: Of a value, and of a field's name, which may have keys of the caller's in it.
MAX_SHOWN = 120
#: Of a whole message; encoded, it has to fit into a call's trailing metadata.
MAX_MESSAGE = 1_000


class ColmError(Exception):
    """Base of every error that colm-serve raises on purpose."""


class InvalidArgument(ColmError):
    """A request field has a value that is not allowed.

    The message always names the field, the value and what is allowed.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = _encodable(field, MAX_SHOWN)
        self.value = value
        self.allowed = _encodable(allowed, MAX_MESSAGE)
        super().__init__(f"{self.field}: {_shown(value)} is not allowed; allowed: {self.allowed}")


class UnknownModel(InvalidArgument):
    """The `model` field names no model that this cluster serves."""


class UnknownRequest(InvalidArgument):
    """No such request is under way: it has ended, or is none of the caller's."""


class RequestTooLarge(InvalidArgument):
    """A field has more than the cluster's limits let it: nothing else was looked at."""


class InvalidConfig(ColmError):
    """A configuration key has a value that is not allowed."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}: {value!r} is not allowed; allowed: {allowed}")
        self.key = key


class CheckpointError(ColmError):
    """A model folder cannot be read as a CoLM checkpoint."""


class WriteFailed(ColmError):
    """A file or folder cannot be written, as on a full disk; the message names it."""


class Incompatible(ColmError):
    """Two workers hold different weights, or lay KV out differently."""


class Unauthenticated(ColmError):
    """The caller has no API key where one is needed, or one that nobody has."""


class ResourceExhausted(ColmError):
    """There is no room for the request now."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TargetsMissed(ResourceExhausted):
    """There is room, but the request's targets, or those of others, would be missed."""


class RateLimited(ResourceExhausted):
    """A tenant has used up one of its limits; the message names it."""


class Unavailable(ColmError):
    """The peer is gone, draining or not there yet."""


class DataLoss(ColmError):
    """A frame or stream arrived damaged or incomplete."""


class DeadlineExceeded(ColmError):
    """A wait ran past its deadline."""


class RowFailed(ColmError):
    """A worker could not go on with one request: its scores were no numbers, its rules failed.

    It would fail elsewhere too, and says nothing of the worker.
    """


class WorkerFailed(ColmError):
    """A worker failed at a request for a reason of its own; another may serve it."""


class _Repr(reprlib.Repr):
    """Of large values only the beginning is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxother = MAX_SHOWN

    def repr_str(self, x: str, level: int) -> str:
        if len(x) <= MAX_SHOWN:
            return repr(x)
        return f"{x[:MAX_SHOWN]!r}… ({len(x)} characters)"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= MAX_SHOWN else f"{x[:MAX_SHOWN]!r}… ({len(x)} bytes)"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out those of over 4,300 digits.
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


def _shown(value: object) -> str:
    """A value as messages show it, in time that does not grow with it."""
    return _cut(_Repr().repr(value), 2 * MAX_SHOWN)


def _encodable(text: str, most: int) -> str:
    """At most `most` characters of a text, with lone surrogates written as escapes."""
    return _cut(text, most).encode("utf-8", "backslashreplace").decode("utf-8")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
