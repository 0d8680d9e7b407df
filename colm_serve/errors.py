"""The one exception tree.

    ColmError
    ├── InvalidArgument      the caller sent something that can never work
    │   └── UnknownModel
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
    └── DeadlineExceeded     a wait ran past its bound

The gRPC status of each is given in `transport.status`, the HTTP status in `router.http`.
"""


class ColmError(Exception):
    """Base of every error that colm-serve raises on purpose."""


class InvalidArgument(ColmError):
    """A request field has a value that is not allowed.

    The message always names the field, the value and what is allowed.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = f"{shown[:120]}… ({len(shown)} characters)"
        super().__init__(f"{field}: {shown} is not allowed; allowed: {allowed}")
        self.field = field
        self.allowed = allowed


class UnknownModel(InvalidArgument):
    """The `model` field names no model that this cluster serves."""


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
