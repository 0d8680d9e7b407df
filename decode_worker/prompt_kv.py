"""Get a prompt's keys and values into the sequence's own pages: shipped, or computed here.

The decode worker opens the Prefill call and writes what it receives itself; nobody else touches
its pages, and ending the call ends the transfer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from colm_serve.core import KvLayout, PrefillPeer, PrefillRequest
from colm_serve.decode_worker.codec_choice import CodecChoice, Transfer
from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.decode_worker.peer_speeds import StreamMeter
from colm_serve.decode_worker.prefill_planner import PrefillPlanner
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.decode_worker.shipment import Shipment
from colm_serve.decode_worker.waiting import end_tasks, wait_out
from colm_serve.errors import ColmError, DataLoss, DeadlineExceeded
from colm_serve.kv.pool import KvPool
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport import serde
from colm_serve.transport.channel_cache import ChannelCache
from colm_serve.transport.codecs import CODECS, GROUP_TOKENS, get_codec
from colm_serve.transport.kv_frames import EndFrame, Frame, KvFrame, OpenFrame
from colm_serve.transport.shared_memory import ReceivingSegment
from colm_serve.transport.status import from_rpc_error

logger = logging.getLogger(__name__)

#: A few frames; more of it would only be touched for the first time more often.
RING_BYTES = 16 * 1024 * 1024
PREFILL_METHOD = "/colm.v1.PrefillService/Prefill"
PREFILL_LANE_METHOD = "/colm.v1.PrefillService/PrefillLane"

_PrefillCall = grpc.aio.UnaryStreamCall[Any, bytes]


def _as_is(message: bytes) -> bytes:
    """Spare the payload protobuf's copies: `transport.kv_frames` reads the message itself."""
    return message


def _bytes_per_token(codec: str, layout: KvLayout) -> float:
    """In all layers."""
    return layout.num_layers * get_codec(codec).num_bytes(layout, GROUP_TOKENS) / GROUP_TOKENS


@dataclass
class _Reception:
    """What comes of one call for a prompt's keys and values."""

    writer: FrameWriter
    transfer: Transfer
    meter: StreamMeter
    shipment: Shipment
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_enough(self) -> bool:
        """What is best computed here is all that is missing."""
        return self.writer.num_complete >= self.shipment.until

    def note(self, frame: Frame, now: float) -> None:
        """Learn from a frame that has been written."""
        self.transfer.take(frame, self.writer.num_payload_bytes(frame), now)
        match frame:
            case OpenFrame():
                self.meter.opened(frame.num_cached_tokens, now)
            case KvFrame(_, layer, start, num_tokens):
                self.meter.received(layer, start, num_tokens, now)
        self.shipment.note(frame, self.writer.num_complete, now)
        self._changed.set()

    async def until_enough(self) -> None:
        """Return once nothing more is worth waiting for, whether or not anything is heard."""
        while not self.is_enough:
            self._changed.clear()
            patience_s = self.shipment.due - time.perf_counter()
            try:
                async with asyncio.timeout(patience_s):
                    await self._changed.wait()
            except TimeoutError:
                self.shipment.decide(self.writer.num_complete, time.perf_counter())


class PromptFetcher:
    """Receives prompts' keys and values from prefill workers."""

    def __init__(
        self,
        pool: KvPool,
        layout: KvLayout,
        kv_identity: str,
        channels: ChannelCache,
        frame_timeout_s: float,
        kv_codec: str,
        planner: PrefillPlanner,
        *,
        use_shared_memory: bool = False,
        num_connections: int = 1,
    ) -> None:
        self._pool = pool
        self._layout = layout
        self._kv_identity = kv_identity
        self._channels = channels
        self._frame_timeout_s = frame_timeout_s
        names = CODECS if kv_codec == "auto" else (kv_codec,)
        self._codecs = CodecChoice({name: _bytes_per_token(name, layout) for name in names})
        self._planner = planner
        self._use_shared_memory = use_shared_memory
        self._num_connections = num_connections
        # Checking and copying frames is work; the event loop does none.
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="kv-write")

    def close(self) -> None:
        self._writers.shutdown()

    async def fetch(self, sequence: Sequence, due: float | None = None) -> None:
        """Ask the request's prefill workers in turn until all that is best shipped is here.

        The first token is due when `time.perf_counter` says `due`.

        What one worker had delivered before it failed or refused is kept. When all have failed,
        or computing here is cheaper, some tokens are still missing: `sequence.num_missing` says
        how many.
        """
        for peer in sequence.request.prefill_peers:
            if sequence.num_missing == 0:
                return
            if not self._planner.is_asking_worthwhile(peer.address, sequence):
                continue
            try:
                await self._fetch_from(peer, sequence, due)
                return
            except (grpc.aio.AioRpcError, ColmError) as error:
                cause = from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
                logger.warning(
                    "request %s: prefill worker %s failed with %d tokens missing: %s",
                    sequence.request.request_id, peer.address, sequence.num_missing, cause,
                )  # fmt: skip

    async def _fetch_from(self, peer: PrefillPeer, sequence: Sequence, due: float | None) -> None:
        segment = self._make_segment()
        try:
            await self._fetch_through(segment, peer, sequence, due)
        finally:
            if segment is not None:
                segment.close()

    def _make_segment(self) -> ReceivingSegment | None:
        """Whether the worker is on this machine, it finds out: see `transport.shared_memory`."""
        if not self._use_shared_memory:
            return None
        try:
            return ReceivingSegment(RING_BYTES)
        except OSError as error:
            logger.warning("no shared memory for KV, which comes in messages then: %s", error)
            return None

    async def _fetch_through(
        self,
        segment: ReceivingSegment | None,
        peer: PrefillPeer,
        sequence: Sequence,
        due: float | None,
    ) -> None:
        request = PrefillRequest(
            request_id=sequence.request.request_id,
            tokens=tuple(sequence.tokens[: sequence.num_prefill]),
            ship_from=sequence.num_computed,
            kv_identity=self._kv_identity,
            layout=self._layout,
            stream_id=secrets.randbits(64),
            cache_salt=sequence.request.cache_salt,
            codec=self._codecs.choose(peer.address),
            ttft_s=None if due is None else max(0.0, due - time.perf_counter()),
            segment=None if segment is None else segment.name,
            num_lanes=min(self._num_connections, self._layout.num_layers),
        )
        table = self._pool.table(sequence.pages)
        writer = FrameWriter(self._pool, table, request, peer.epoch, segment)
        now = time.perf_counter()
        reception = _Reception(
            writer,
            Transfer(len(request.tokens)),
            self._planner.meter(peer.address, now),
            self._planner.shipment(peer.address, sequence, now),
        )
        try:
            async with self._channels.use(peer.address) as channel:
                await self._receive_from(channel, peer.address, request, reception)
            if sequence.num_prefill > writer.num_complete:
                logger.info(
                    "request %s: %d tokens are computed here rather than by prefill worker %s",
                    request.request_id, sequence.num_prefill - writer.num_complete, peer.address,
                )  # fmt: skip
            self._codecs.learn(peer.address, reception.transfer)
        finally:
            sequence.num_shipped += writer.num_complete - sequence.num_computed
            sequence.num_computed = writer.num_complete

    async def _receive_from(
        self,
        channel: grpc.aio.Channel,
        address: str,
        request: PrefillRequest,
        reception: _Reception,
    ) -> None:
        prefill = channel.unary_stream(
            PREFILL_METHOD,
            request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
            response_deserializer=_as_is,
        )
        call = prefill(serde.prefill_request_to_proto(request))
        receiving = asyncio.create_task(self._receive(call, address, request.stream_id, reception))
        enough = asyncio.create_task(reception.until_enough())
        try:
            done, _ = await asyncio.wait((receiving, enough), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # A cancelled or failed stream ends here, on both sides; nothing outlives the call.
            call.cancel()
            await end_tasks(receiving, enough)

    async def _receive(
        self, call: _PrefillCall, address: str, stream_id: int, reception: _Reception
    ) -> None:
        """Take the frames of all lanes."""
        try:
            async with asyncio.TaskGroup() as lanes:
                async for frame in self._frames(call, 0, reception):
                    if isinstance(frame, OpenFrame):
                        for lane in range(1, reception.writer.num_lanes):
                            receiving = self._receive_lane(address, stream_id, lane, reception)
                            lanes.create_task(receiving)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _receive_lane(
        self, address: str, stream_id: int, lane: int, reception: _Reception
    ) -> None:
        async with self._channels.use(address, lane) as channel:
            prefill_lane = channel.unary_stream(
                PREFILL_LANE_METHOD,
                request_serializer=prefill_pb2.PrefillLaneRequest.SerializeToString,
                response_deserializer=_as_is,
            )
            call = prefill_lane(prefill_pb2.PrefillLaneRequest(stream_id=stream_id, lane=lane))
            try:
                async for _ in self._frames(call, lane, reception):
                    pass
            finally:
                call.cancel()

    async def _frames(
        self, call: _PrefillCall, lane: int, reception: _Reception
    ) -> AsyncIterator[Frame]:
        """A lane's frames up to its last one that is wanted, each taken."""
        while True:
            try:
                async with asyncio.timeout(self._frame_timeout_s):
                    message = await call.read()
            except TimeoutError as error:
                raise DeadlineExceeded(f"no KV frame for {self._frame_timeout_s} s") from error
            if not isinstance(message, bytes):
                raise DataLoss("KV stream ended without its end frame")
            frame = await self._write(reception.writer, message, lane)
            reception.note(frame, time.perf_counter())
            yield frame
            if isinstance(frame, EndFrame) or reception.is_enough:
                return

    async def _write(self, writer: FrameWriter, message: bytes, lane: int) -> Frame:
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._writers, writer.accept, message, lane)
        # The pages are freed once this returns: the write into them has to end first.
        await wait_out(writing)
        return writing.result()
