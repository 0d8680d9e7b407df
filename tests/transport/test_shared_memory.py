"""Payloads through a ring in shared memory; both ends in one process, but opened as by another."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from colm_serve.errors import DataLoss
from colm_serve.transport.shared_memory import ReceivingSegment, SendingSegment
from tests.segments import num_segments

RING_BYTES = 4096


@pytest.fixture
def receiving() -> Iterator[ReceivingSegment]:
    segment = ReceivingSegment(RING_BYTES)
    yield segment
    segment.close()


@pytest.fixture
def sending(receiving: ReceivingSegment) -> SendingSegment:
    return SendingSegment(receiving.name)


def test_payloads_of_any_size_come_in_order_round_the_ring(
    receiving: ReceivingSegment, sending: SendingSegment
) -> None:
    sizes = random.Random(0)
    waiting: list[tuple[bytes, bytes]] = []
    num_full = 0
    for _ in range(500):
        payload = sizes.randbytes(sizes.randint(1, RING_BYTES // 2))
        while not sending.has_room(len(payload)):
            num_full += 1
            descriptor, expected = waiting.pop(0)
            assert receiving.take(descriptor) == expected
            receiving.free(descriptor)
        half = len(payload) // 2
        waiting.append((sending.put([payload[:half], payload[half:]]), payload))
    assert num_full > 100


def test_the_whole_ring_can_be_one_payload(
    receiving: ReceivingSegment, sending: SendingSegment
) -> None:
    for fill in range(3):
        payload = bytes([fill]) * RING_BYTES
        descriptor = sending.put([payload])
        assert not sending.has_room(1)
        assert receiving.take(descriptor) == payload
        receiving.free(descriptor)


def test_every_damaged_byte_is_noticed(
    receiving: ReceivingSegment, sending: SendingSegment
) -> None:
    payload = random.Random(1).randbytes(64)
    descriptor = sending.put([payload])
    for at in range(64):
        # The sender's memory is the receiver's.
        sending._ring[at] ^= 1 << at % 8
        with pytest.raises(DataLoss, match="damaged"):
            receiving.take(descriptor)
        sending._ring[at] ^= 1 << at % 8
    assert receiving.take(descriptor) == payload


@pytest.mark.parametrize(
    "descriptor",
    [
        b"",
        bytes(23),
        struct.pack("<QQQ", RING_BYTES - 1, 2, 0),
        struct.pack("<QQQ", 2**64 - 1, 2**64 - 1, 0),
        struct.pack("<QQQ", RING_BYTES, 1, 0),
        struct.pack("<QQQ", 0, RING_BYTES + 1, 0),
        struct.pack("<QQQ", 0, 8, 1),
    ],
)
def test_a_descriptor_of_nothing_is_refused(receiving: ReceivingSegment, descriptor: bytes) -> None:
    with pytest.raises(DataLoss):
        receiving.take(descriptor)


def test_what_was_freed_cannot_be_taken_again(
    receiving: ReceivingSegment, sending: SendingSegment
) -> None:
    descriptor = sending.put([b"once"])
    receiving.free(descriptor)
    with pytest.raises(DataLoss, match="not there"):
        receiving.take(descriptor)


@pytest.mark.parametrize("field", ["ring_bytes", "nonce", "fd", "pid"])
def test_another_segment_than_the_named_one_is_not_opened(
    receiving: ReceivingSegment, field: str
) -> None:
    name = receiving.name
    wrong = {"ring_bytes": 2 * RING_BYTES, "nonce": name.nonce ^ 1, "fd": 10**6, "pid": 2**22 + 1}
    with pytest.raises((OSError, ValueError)):
        SendingSegment(replace(name, **{field: wrong[field]}))


def test_other_files_are_not_opened(receiving: ReceivingSegment) -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb"), pytest.raises(ValueError, match="not a segment"):
        SendingSegment(replace(receiving.name, fd=read))


def test_a_segment_that_could_shrink_is_not_opened() -> None:
    fd = os.memfd_create("colm-kv", os.MFD_ALLOW_SEALING)
    with open(fd, "r+b"):
        os.ftruncate(fd, 2 * RING_BYTES)
        receiving = ReceivingSegment(RING_BYTES)
        with pytest.raises(ValueError, match="not a segment of"):
            SendingSegment(replace(receiving.name, fd=fd))
        receiving.close()


def test_a_ring_beyond_the_bound_is_not_mapped(receiving: ReceivingSegment) -> None:
    with pytest.raises(ValueError, match="a ring of"):
        SendingSegment(replace(receiving.name, ring_bytes=2**40))


def test_a_closed_segment_is_gone_with_its_last_user() -> None:
    before = num_segments(os.getpid())
    receiving = ReceivingSegment(RING_BYTES)
    name = receiving.name
    sending = SendingSegment(name)
    assert num_segments(os.getpid()) == before + 2
    receiving.close()
    with pytest.raises((OSError, ValueError)):
        SendingSegment(name)
    # Too late, but it harms nobody.
    sending.put([b"late"])
    del receiving, sending
    assert num_segments(os.getpid()) == before
