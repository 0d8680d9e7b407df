"""Damage that a stream of messages may come to, as plain values that any test can apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Messages = list[bytes]


@dataclass(frozen=True)
class Mutation:
    """One damage; `at`, `to` and `how` are taken modulo what there is to choose from."""

    kind: str
    at: int
    to: int
    how: int

    def apply(self, messages: Sequence[bytes], foreign: Sequence[bytes]) -> Messages:
        """The stream so damaged; parts of `foreign`, another stream, may come into it."""
        if not messages:
            return list(foreign)
        return _KINDS[self.kind](list(messages), list(foreign), self)


def _flip_bit(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    at, message = _pick(messages, mutation.at)
    damaged = bytearray(message)
    if damaged:
        damaged[mutation.to % len(damaged)] ^= 1 << mutation.how % 8
    return [*messages[:at], bytes(damaged), *messages[at + 1 :]]


def _drop(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    at, _ = _pick(messages, mutation.at)
    return messages[:at] + messages[at + 1 + mutation.how % 3 :]


def _duplicate(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    _, message = _pick(messages, mutation.at)
    to = mutation.to % (len(messages) + 1)
    return [*messages[:to], message, *messages[to:]]


def _swap(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    (at, left), (to, right) = _pick(messages, mutation.at), _pick(messages, mutation.to)
    messages[at], messages[to] = right, left
    return messages


def _end_early(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    return messages[: mutation.at % len(messages)]


def _splice(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    """A run of another stream's messages, in the place of as many of this one's or between."""
    at, _ = _pick(messages, mutation.at)
    begin = mutation.to % len(foreign)
    run = foreign[begin : begin + 1 + mutation.how // 2 % 4]
    num_lost = len(run) if mutation.how % 2 else 0
    return messages[:at] + run + messages[at + num_lost :]


def _cut_bytes(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    at, message = _pick(messages, mutation.at)
    begin = mutation.to % (len(message) + 1)
    return [*messages[:at], message[:begin] + message[begin + mutation.how :], *messages[at + 1 :]]


def _insert_bytes(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    """Also of the message itself: fields that come twice."""
    at, message = _pick(messages, mutation.at)
    begin = mutation.to % (len(message) + 1)
    piece = message[mutation.how % (len(message) + 1) :][: 1 + mutation.how]
    damaged = message[:begin] + (piece or b"\x00") + message[begin:]
    return [*messages[:at], damaged, *messages[at + 1 :]]


def _append_junk(messages: Messages, foreign: Messages, mutation: Mutation) -> Messages:
    junk = mutation.to.to_bytes(8, "little")[: mutation.how % 9]
    at = mutation.at % (len(messages) + 1)
    return [*messages[:at], junk, *messages[at:]]


_KINDS: dict[str, Callable[[Messages, Messages, Mutation], Messages]] = {
    "flip a bit": _flip_bit,
    "drop": _drop,
    "duplicate": _duplicate,
    "swap": _swap,
    "end early": _end_early,
    "splice": _splice,
    "cut bytes": _cut_bytes,
    "insert bytes": _insert_bytes,
    "append junk": _append_junk,
}
KINDS = tuple(_KINDS)


def _pick(messages: Messages, index: int) -> tuple[int, bytes]:
    at = index % len(messages)
    return at, messages[at]
