"""colm.v1.DecodeService: translates between the wire and decode sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import grpc.aio

from colm_serve.config import DecodeConfig, TlsConfig
from colm_serve.core import DecodeRequest
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.decode_worker.prefill_planner import PrefillPlanner
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.session import DecodeSession
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.errors import ColmError, DeadlineExceeded, UnknownRequest
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc
from colm_serve.transport import serde
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.channel_cache import ChannelCache
from colm_serve.transport.health import add_health
from colm_serve.transport.stall import in_time
from colm_serve.transport.status import abort

_Context = grpc.aio.ServicerContext[Any, Any]


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Serves one DecodeWorker; implements `transport.host.Service`."""

    def __init__(
        self, worker: DecodeWorker, config: DecodeConfig, tls: TlsConfig | None = None
    ) -> None:
        self._worker = worker
        self._config = config
        self._tls = tls
        self._sessions: dict[str, DecodeSession] = {}
        self.address = ""

    async def start(self) -> None:
        self._server = make_server()
        self._channels = ChannelCache(self._tls)
        self._grammars = GrammarQueue(self._worker.grammars)
        self._planner = PrefillPlanner(self._worker.local_load, self._worker.layout.num_layers)
        self._fetcher = PromptFetcher(
            self._worker.pool,
            self._worker.layout,
            self._worker.kv_identity,
            self._channels,
            self._config.frame_timeout_s,
            self._config.kv_codec,
            self._planner,
            use_shared_memory=self._config.shared_memory,
            num_connections=self._config.kv_connections,
        )
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._server)
        await add_health(self._server)
        self.address = bind(self._server, self._config.host, 0, self._tls)
        self._worker.start()
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        await self._channels.close()
        await asyncio.get_running_loop().run_in_executor(None, self._worker.stop)
        self._fetcher.close()
        self._grammars.close()

    async def GetStatus(
        self, request: decode_pb2.DecodeStatusRequest, context: _Context
    ) -> decode_pb2.DecodeStatus:
        status = replace(self._worker.status(), transfer_cost=self._planner.transfer_cost)
        return serde.decode_status_to_proto(status)

    async def Decode(self, request: decode_pb2.DecodeStart, context: _Context) -> None:
        try:
            async with asyncio.timeout(self._config.max_request_s):
                with self._opened(serde.decode_start_from_proto(request)) as session:
                    async with aclosing(session.events()) as events:
                        async for event in events:
                            writing = context.write(serde.decode_event_to_proto(event))
                            await in_time(writing, self._config.stall_timeout_s)
        except TimeoutError:
            late = DeadlineExceeded(f"not done within max_request_s: {self._config.max_request_s}")
            await abort(context, late)
        except ColmError as error:
            await abort(context, error)

    async def MoveLevel(
        self, request: decode_pb2.MoveLevelRequest, context: _Context
    ) -> decode_pb2.MoveLevelResponse:
        move = serde.move_level_from_proto(request)
        try:
            session = self._sessions.get(move.request_id)
            if session is None:
                allowed = "the id of a request under way here"
                raise UnknownRequest("request_id", move.request_id, allowed)
            session.move_level(move.level)
        except ColmError as error:
            await abort(context, error)
        return decode_pb2.MoveLevelResponse()

    @contextmanager
    def _opened(self, request: DecodeRequest) -> Iterator[DecodeSession]:
        session = DecodeSession(
            self._worker,
            self._fetcher,
            self._grammars,
            request,
            self._config.local_prefill_tokens,
        )
        self._sessions[request.request_id] = session
        try:
            yield session
        finally:
            # A router may have come back with the request before its first call has ended here.
            if self._sessions.get(request.request_id) is session:
                del self._sessions[request.request_id]
