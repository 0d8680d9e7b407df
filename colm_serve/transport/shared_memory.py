"""Payloads of KV frames by shared memory, between two processes of one machine.

The receiver makes a segment for one call and names it in its request; the sender puts payloads
into it, in a ring, and sends descriptors of them in their place. A segment has no name in any
file system: once neither process has it open, however they ended, the kernel takes it back. So
there is nothing to reap, and a sender that writes too late harms nobody.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Sequence

import numpy as np
import xxhash

from colm_serve.core import SegmentName
from colm_serve.errors import DataLoss

Buffer = bytes | bytearray | memoryview

#: A segment's ring at most; a sender maps no more than that for a caller.
MAX_RING_BYTES = 256 * 1024 * 1024

_MEMFD_NAME = "colm-kv"
#: What comes before the ring: the nonce, and on a cache line of its own how far it was read.
_HEAD_BYTES = 4096
_CONSUMED_AT = 64
#: Copied, then digested, while it is in a core's cache.
_PIECE_BYTES = 128 * 1024
#: Position in the stream of all payloads, size and digest of one.
_DESCRIPTOR = struct.Struct("<QQQ")
#: A sender must not fault because the receiver has cut its segment short.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class _Segment:
    """A mapped segment; unmapped once it is closed and no payload of it is in use."""

    def __init__(self, fd: int, ring_bytes: int) -> None:
        memory = np.frombuffer(mmap.mmap(fd, _HEAD_BYTES + ring_bytes), np.uint8)
        self._ring_bytes = ring_bytes
        self._nonce = memory[:8].view(np.uint64)
        # One aligned store or load of 8 bytes: neither side sees half of it.
        self._consumed = memory[_CONSUMED_AT : _CONSUMED_AT + 8].view(np.uint64)
        self._ring = memory[_HEAD_BYTES:]

    def close(self) -> None:
        """It cannot be used any more."""
        # Not mmap.close: a thread may still be at work with a payload, in a cancelled call.
        del self._nonce, self._consumed, self._ring


class ReceivingSegment(_Segment):
    """The receiver's end, which lives as long as its call."""

    def __init__(self, ring_bytes: int) -> None:
        self._fd = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, _HEAD_BYTES + ring_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(self._fd, ring_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._nonce[0] = secrets.randbits(64)

    @property
    def name(self) -> SegmentName:
        """What the sender has to know."""
        return SegmentName(os.getpid(), self._fd, self._ring_bytes, int(self._nonce[0]))

    def take(self, descriptor: Buffer) -> memoryview:
        """The payload that a descriptor stands for, in place, until `free`.

        Raises:
            DataLoss: not a descriptor of what is in the ring, or the payload is damaged.
        """
        start, end, digest = self._read(descriptor)
        payload = self._ring[start % self._ring_bytes :][: end - start].data
        if xxhash.xxh3_64_intdigest(payload) != digest:
            raise DataLoss(f"payload of {end - start} bytes in shared memory: damaged")
        return payload

    def free(self, descriptor: Buffer) -> None:
        """The sender may use the payload's place again."""
        self._consumed[0] = self._read(descriptor)[1]

    def close(self) -> None:
        """No sender can open the segment any more; its memory goes with its last user."""
        os.close(self._fd)
        super().close()

    def _read(self, descriptor: Buffer) -> tuple[int, int, int]:
        """Start, end and digest of a payload."""
        if memoryview(descriptor).nbytes != _DESCRIPTOR.size:
            raise DataLoss(f"descriptor of {memoryview(descriptor).nbytes} bytes")
        start, num_bytes, digest = _DESCRIPTOR.unpack(descriptor)
        end, consumed = start + num_bytes, int(self._consumed[0])
        is_whole = start % self._ring_bytes + num_bytes <= self._ring_bytes
        if not (is_whole and consumed <= start and end <= consumed + self._ring_bytes):
            raise DataLoss(f"descriptor of {num_bytes} bytes at {start}, which are not there")
        return start, end, digest


class SendingSegment(_Segment):
    """The sender's end."""

    def __init__(self, name: SegmentName) -> None:
        """Open the segment of a process of this machine.

        Raises:
            OSError, ValueError: there is none of that name that this process may open.
        """
        if not 0 < name.ring_bytes <= MAX_RING_BYTES:
            raise ValueError(f"a ring of {name.ring_bytes} bytes, allowed: to {MAX_RING_BYTES}")
        path = f"/proc/{name.pid}/fd/{name.fd}"
        # Looked at before it is opened: to open a device may do something.
        if not os.readlink(path).startswith(f"/memfd:{_MEMFD_NAME}"):
            raise ValueError(f"{path} is not a segment")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not is_sealed or os.fstat(fd).st_size != _HEAD_BYTES + name.ring_bytes:
                raise ValueError(f"{path} is not a segment of {name.ring_bytes} bytes")
            super().__init__(fd, name.ring_bytes)
        finally:
            os.close(fd)
        if int(self._nonce[0]) != name.nonce:
            raise ValueError(f"{path} is another segment")
        self._produced = 0

    @property
    def ring_bytes(self) -> int:
        return self._ring_bytes

    def has_room(self, num_bytes: int) -> bool:
        """A payload of this size can be put now."""
        return self._place(num_bytes) + num_bytes <= int(self._consumed[0]) + self._ring_bytes

    def put(self, parts: Sequence[Buffer]) -> bytes:
        """Copy a payload, for which there is room, into the ring; returns its descriptor."""
        digest = xxhash.xxh3_64()
        num_bytes = sum(memoryview(part).nbytes for part in parts)
        assert self.has_room(num_bytes), f"no room for {num_bytes} bytes"
        position = self._place(num_bytes)
        at = position % self._ring_bytes
        for part in parts:
            source = memoryview(part).cast("B")
            for start in range(0, len(source), _PIECE_BYTES):
                piece = source[start : start + _PIECE_BYTES]
                self._ring[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                digest.update(piece)
                at += len(piece)
        self._produced = position + num_bytes
        return _DESCRIPTOR.pack(position, num_bytes, digest.intdigest())

    def _place(self, num_bytes: int) -> int:
        """Where the next payload begins: in one piece, so perhaps at the ring's start."""
        left = self._ring_bytes - self._produced % self._ring_bytes
        return self._produced + (left if num_bytes > left else 0)
