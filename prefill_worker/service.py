"""colm.v1.PrefillService: KV frames as the response stream of the caller's own call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing

import grpc
import grpc.aio

from colm_serve.config import PrefillConfig, TlsConfig
from colm_serve.core import PrefillRequest
from colm_serve.errors import ColmError, DeadlineExceeded
from colm_serve.prefill_worker.frame_packer import FramePacker
from colm_serve.prefill_worker.lanes import LaneTable
from colm_serve.prefill_worker.worker import JobNews, LayerDone, PrefillWorker, PromptDone, TurnDone
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport import serde
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.health import add_health
from colm_serve.transport.stall import in_time, stalled
from colm_serve.transport.status import abort

#: Room in shared memory comes without notice: it is looked for this often.
ROOM_INTERVAL_S = 0.0005
#: Who waits is told how far the worker has come, but no more often than this: twice in the time
#: after which the receiver asks itself, see `decode_worker.shipment`.
WAIT_INTERVAL_S = 0.25

_Context = grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, bytes]
_LaneContext = grpc.aio.ServicerContext[prefill_pb2.PrefillLaneRequest, bytes]


class PrefillService:
    """Serves one PrefillWorker; implements `transport.host.Service`."""

    def __init__(
        self, worker: PrefillWorker, config: PrefillConfig, tls: TlsConfig | None = None
    ) -> None:
        self._worker = worker
        self._config = config
        self._tls = tls
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="kv-pack")
        self._lanes = LaneTable()
        self.address = ""

    async def start(self) -> None:
        self._server = make_server()
        self._server.add_generic_rpc_handlers((self._handlers(),))
        await add_health(self._server)
        self.address = bind(self._server, self._config.host, 0, self._tls)
        self._worker.start()
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        await asyncio.get_running_loop().run_in_executor(None, self._worker.stop)
        self._packer.shutdown()

    def _handlers(self) -> grpc.GenericRpcHandler:
        # Registered by hand: the responses are bytes already (see transport.kv_frames).
        return grpc.method_handlers_generic_handler(
            "colm.v1.PrefillService",
            {
                "Prefill": grpc.unary_stream_rpc_method_handler(
                    self._prefill,
                    request_deserializer=prefill_pb2.PrefillRequest.FromString,
                    response_serializer=None,
                ),
                "PrefillLane": grpc.unary_stream_rpc_method_handler(
                    self._prefill_lane,
                    request_deserializer=prefill_pb2.PrefillLaneRequest.FromString,
                    response_serializer=None,
                ),
                "GetStatus": grpc.unary_unary_rpc_method_handler(
                    self._get_status,
                    request_deserializer=prefill_pb2.PrefillStatusRequest.FromString,
                    response_serializer=prefill_pb2.PrefillStatus.SerializeToString,
                ),
            },
        )

    async def _get_status(
        self, request: prefill_pb2.PrefillStatusRequest, context: object
    ) -> prefill_pb2.PrefillStatus:
        return serde.prefill_status_to_proto(self._worker.status())

    async def _prefill(self, message: prefill_pb2.PrefillRequest, context: _Context) -> None:
        try:
            request = serde.prefill_request_from_proto(message)
            async with asyncio.timeout(self._config.max_request_s):
                frames = self._frames(request, context.time_remaining())
                with self._lanes.open(request.stream_id, request.num_lanes) as lanes:
                    async with aclosing(frames):
                        async for lane, frame in frames:
                            write = lanes[lane - 1].put if lane else context.write
                            await self._in_time(write(frame))
                    for further in lanes:
                        await self._in_time(further.put(None))
        except TimeoutError:
            late = DeadlineExceeded(f"not done within max_request_s: {self._config.max_request_s}")
            await abort(context, late)
        except ColmError as error:
            await abort(context, error)

    async def _prefill_lane(
        self, message: prefill_pb2.PrefillLaneRequest, context: _LaneContext
    ) -> None:
        try:
            lane = self._lanes.get(message.stream_id, message.lane)
            async with aclosing(lane.frames()) as frames:
                async for frame in frames:
                    await self._in_time(context.write(frame))
        except ColmError as error:
            await abort(context, error)

    async def _in_time(self, sending: Awaitable[None]) -> None:
        # What it holds back waits in the job's pages, and nobody else waits.
        await in_time(sending, self._config.stall_timeout_s)

    async def _wait_for_room(self, packer: FramePacker) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.stall_timeout_s
        while not packer.has_room:
            if loop.time() > deadline:
                raise stalled(self._config.stall_timeout_s)
            await asyncio.sleep(ROOM_INTERVAL_S)

    async def _frames(
        self, request: PrefillRequest, remaining_s: float | None
    ) -> AsyncGenerator[tuple[int, bytes]]:
        """The frames that answer a request, and the lane of each."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[JobNews] = asyncio.Queue()
        job = self._worker.submit(
            request, lambda item: loop.call_soon_threadsafe(news.put_nowait, item), remaining_s
        )
        try:
            with closing(FramePacker(self._worker, job)) as packer:
                item: JobNews | None = None
                sent = -math.inf
                while not isinstance(item, PromptDone):
                    item = await news.get()
                    if isinstance(item, ColmError):
                        raise item
                    if isinstance(item, TurnDone) and loop.time() < sent + WAIT_INTERVAL_S:
                        continue
                    for lane, pack in packer.packs(item):
                        await self._wait_for_room(packer)
                        yield lane, await loop.run_in_executor(self._packer, pack)
                        sent = loop.time()
                    if (
                        isinstance(item, LayerDone)
                        and item.layer == self._worker.layout.num_layers - 1
                    ):
                        self._worker.sent(job, item.stop)
        finally:
            self._worker.finish(job)
