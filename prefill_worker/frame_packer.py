"""Make the KV frames of one stream out of what becomes of its job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property, partial

from colm_serve.core import PrefillRequest
from colm_serve.kv.pool import BlockTable
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.worker import (
    Accepted,
    LayerDone,
    PrefillWorker,
    PromptDone,
    TurnDone,
)
from colm_serve.transport import kv_frames
from colm_serve.transport.codecs import get_codec
from colm_serve.transport.kv_frames import (
    MESSAGE,
    SHARED_MEMORY,
    EndFrame,
    KvFrame,
    OpenFrame,
    WaitFrame,
)
from colm_serve.transport.shared_memory import SendingSegment

logger = logging.getLogger(__name__)

#: About this many bytes of K and V a message is where gRPC moves them fastest; shared memory is
#: the faster, the fewer frames there are.
FRAME_BYTES = {MESSAGE: 1024 * 1024, SHARED_MEMORY: 4 * 1024 * 1024}


class FramePacker:
    """Numbers and packs the frames that answer one request."""

    def __init__(self, worker: PrefillWorker, job: PrefillJob) -> None:
        self._worker = worker
        token_bytes = worker.pool.num_bytes_per_token
        shared_bytes = max(token_bytes, FRAME_BYTES[SHARED_MEMORY])
        # Room for two frames: the one that is taken out, the one that is put in.
        self._segment = _open_segment(job.request, 2 * shared_bytes)
        self._path = MESSAGE if self._segment is None else SHARED_MEMORY
        self._max_payload_bytes = max(token_bytes, FRAME_BYTES[self._path])
        self._job = job
        self._stream_id = job.request.stream_id
        self._codec = get_codec(job.request.codec)
        self.num_lanes = job.request.num_lanes if self._segment is None else 1
        self._num_frames = [0] * self.num_lanes

    def close(self) -> None:
        """Give up the caller's memory."""
        if self._segment is not None:
            self._segment.close()

    @property
    def has_room(self) -> bool:
        """There is room for the payload of a frame: always, but in shared memory."""
        return self._segment is None or self._segment.has_room(self._max_payload_bytes)

    def packs(
        self, item: Accepted | LayerDone | TurnDone | PromptDone
    ) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """The frames that say `item`, and the lane of each.

        A frame is packed when it is called, on any thread.
        """
        lanes = range(self.num_lanes)
        match item:
            case Accepted():
                yield 0, partial(self._encode, self._opening(item))
            case LayerDone():
                lane = item.layer % self.num_lanes
                step = self._max_payload_bytes // self._worker.pool.num_bytes_per_token
                for start in range(item.start, item.stop, step):
                    num_tokens = min(step, item.stop - start)
                    frame = KvFrame(self._next_sequence(lane), item.layer, start, num_tokens)
                    yield lane, partial(self._encode_kv, frame, lane)
            case TurnDone():
                progress = self._worker.progress(self._job)
                for lane in lanes:
                    wait = WaitFrame(self._next_sequence(lane), progress)
                    yield lane, partial(self._encode, wait, lane)
            case PromptDone():
                for lane in lanes:
                    frame_end = EndFrame(self._next_sequence(lane), item.compute_s)
                    yield lane, partial(self._encode, frame_end, lane)

    def _opening(self, accepted: Accepted) -> OpenFrame:
        return OpenFrame(
            sequence=self._next_sequence(0),
            epoch=self._worker.epoch,
            kv_identity=self._worker.kv_identity,
            layout=self._worker.layout,
            codec=self._job.request.codec,
            path=self._path,
            num_cached_tokens=accepted.num_cached_tokens,
            num_queued_tokens=accepted.num_queued_tokens,
            tokens_per_s=accepted.tokens_per_s,
        )

    def _next_sequence(self, lane: int) -> int:
        self._num_frames[lane] += 1
        return self._num_frames[lane] - 1

    def _encode(self, frame: OpenFrame | WaitFrame | EndFrame, lane: int = 0) -> bytes:
        return kv_frames.encode(frame, kv_frames.lane_id(self._stream_id, lane))

    def _encode_kv(self, frame: KvFrame, lane: int) -> bytes:
        stop = frame.start + frame.num_tokens
        k_SNH, v_SNH = self._worker.pool.read(frame.layer, self._table, frame.start, stop)
        parts = self._codec.encode(k_SNH, v_SNH)
        if self._segment is not None:
            parts = [memoryview(self._segment.put(parts))]
        return kv_frames.encode(frame, kv_frames.lane_id(self._stream_id, lane), parts)

    @cached_property
    def _table(self) -> BlockTable:
        return self._worker.pool.table(self._job.pages)


def _open_segment(request: PrefillRequest, min_ring_bytes: int) -> SendingSegment | None:
    """The request's segment, if there is one, it can be opened and it is large enough."""
    name = request.segment
    if name is None or name.ring_bytes < min_ring_bytes:
        return None
    try:
        return SendingSegment(name)
    except (OSError, ValueError) as error:
        # The caller offers it whether or not it knows that it is on this machine.
        logger.debug("request %s: no shared memory: %s", request.request_id, error)
        return None
