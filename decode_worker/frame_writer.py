"""Check a stream of KV frames and write it into the pages of one sequence."""

from __future__ import annotations

from colm_serve.core import PrefillRequest
from colm_serve.errors import DataLoss, Incompatible, Unavailable
from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.transport import kv_frames
from colm_serve.transport.codecs import get_codec
from colm_serve.transport.kv_frames import (
    MESSAGE,
    SHARED_MEMORY,
    EndFrame,
    Frame,
    KvFrame,
    OpenFrame,
)
from colm_serve.transport.shared_memory import ReceivingSegment


class FrameWriter:
    """Takes the answer to one PrefillRequest, message by message.

    Frames of a layer must follow one another without a gap; layers may be at different tokens.
    """

    def __init__(
        self,
        pool: KvPool,
        table: BlockTable,
        request: PrefillRequest,
        epoch: int | None = None,
        segment: ReceivingSegment | None = None,
    ) -> None:
        """
        Args:
            table: the pages of the request's tokens.
            epoch: of the worker that was asked, where known.
            segment: the one that the request names.
        """
        self._pool = pool
        self._table = table
        self._request = request
        self._epoch = epoch
        self._segment = segment
        self._is_shared = False
        self._codec = get_codec(request.codec)
        self._stop = len(request.tokens)
        self._next = [request.ship_from] * request.layout.num_layers
        self._num_frames = [0] * request.num_lanes
        self._has_ended = [False] * request.num_lanes

    @property
    def stop(self) -> int:
        """The number of tokens once the stream has been taken to its end."""
        return self._stop

    @property
    def num_complete(self) -> int:
        """Tokens [0, this) have their keys and values in every layer."""
        return min(self._next)

    def num_payload_bytes(self, frame: Frame) -> int:
        """What the payload of a frame has, by whatever path."""
        if not isinstance(frame, KvFrame):
            return 0
        return self._codec.num_bytes(self._request.layout, frame.num_tokens)

    @property
    def num_lanes(self) -> int:
        """By how many calls the frames come; known once the opening frame has been taken."""
        return len(self._num_frames)

    def accept(self, message: bytes, lane: int = 0) -> Frame:
        """Take the next message of a lane, and say which frame it was: an EndFrame is the last.

        Raises:
            DataLoss: damaged, of another stream, out of order, of the wrong size, or ended
                too early.
            Incompatible: the sender has other weights or another layout, codec or path.
            Unavailable: the worker that was asked has been replaced since.
        """
        sequence = self._num_frames[lane]
        stream_id = kv_frames.lane_id(self._request.stream_id, lane)
        frame, payload = kv_frames.decode(message, stream_id, sequence)
        if isinstance(frame, OpenFrame) is not (lane == sequence == 0):
            raise DataLoss(f"KV frame {sequence}: {type(frame).__name__} in its place")
        self._num_frames[lane] += 1
        match frame:
            case OpenFrame():
                self._check_opening(frame)
            case KvFrame():
                if frame.layer % self.num_lanes != lane:
                    raise DataLoss(f"KV frame of layer {frame.layer} in lane {lane}")
                self._take(frame, payload)
            case EndFrame():
                self._has_ended[lane] = True
                if all(self._has_ended) and self.num_complete != self._stop:
                    raise DataLoss(
                        f"KV stream ended with {self.num_complete} of {self._stop} tokens complete"
                    )
        return frame

    def _check_opening(self, frame: OpenFrame) -> None:
        request = self._request
        if self._epoch is not None and frame.epoch != self._epoch:
            raise Unavailable(f"epoch: asked worker {self._epoch}, {frame.epoch} answers")
        for field, ours, theirs in (
            ("kv_identity", request.kv_identity, frame.kv_identity),
            ("layout", request.layout, frame.layout),
            ("codec", request.codec, frame.codec),
        ):
            if theirs != ours:
                raise Incompatible(f"{field}: asked for {ours!r}, the worker sends {theirs!r}")
        self._is_shared = frame.path == SHARED_MEMORY
        if self._is_shared:
            # It is wide enough: all come by the first lane.
            del self._num_frames[1:], self._has_ended[1:]
        if frame.path not in (MESSAGE, SHARED_MEMORY) or self._is_shared > bool(self._segment):
            raise Incompatible(f"path: the worker sends by {frame.path!r}, which was not offered")

    def _take(self, frame: KvFrame, payload: memoryview) -> None:
        if self._segment is None or not self._is_shared:
            self._write(frame, payload)
        else:
            self._write(frame, self._segment.take(payload))
            self._segment.free(payload)

    def _write(self, frame: KvFrame, payload: memoryview) -> None:
        if frame.layer >= len(self._next):
            raise DataLoss(f"KV frame of layer {frame.layer}; there are {len(self._next)} layers")
        expected = self._next[frame.layer]
        if frame.start != expected or not 0 < frame.num_tokens <= self._stop - expected:
            raise DataLoss(
                f"KV frame of tokens [{frame.start}, {frame.start + frame.num_tokens}) in layer "
                f"{frame.layer}; expected from {expected}, up to {self._stop}"
            )
        wanted = self.num_payload_bytes(frame)
        if payload.nbytes != wanted:
            raise DataLoss(f"KV frame payload of {payload.nbytes} bytes; expected {wanted}")
        k_SNH, v_SNH = self._codec.decode(payload, self._request.layout, frame.num_tokens)
        self._pool.write(frame.layer, self._table, frame.start, k_SNH, v_SNH)
        self._next[frame.layer] += frame.num_tokens
