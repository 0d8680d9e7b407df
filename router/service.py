"""colm.v1.GenerationService: translates between the wire and the router."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import grpc.aio

from colm_serve.errors import ColmError, RequestTooLarge
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.router import serde
from colm_serve.router.openai.level_headers import level_headers
from colm_serve.router.reading.reader import SMALL_BYTES
from colm_serve.router.request import Started
from colm_serve.router.router import Router
from colm_serve.router.tenants import Tenant
from colm_serve.transport.stall import in_time
from colm_serve.transport.status import abort

_Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
_GENERATE = f"/{SERVICE_NAME}/Generate"


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """A thin servicer over a Router."""

    def __init__(self, router: Router, stall_timeout_s: float) -> None:
        self._router = router
        self._stall_timeout_s = stall_timeout_s

    async def look(self, method: str, data: bytes) -> None:
        """Refuse what takes long to parse; raises ColmError. For `make_server`."""
        reader = self._router.reader
        if method == _GENERATE:
            await reader.message(data)
        elif len(data) > SMALL_BYTES:
            raise RequestTooLarge("request", f"{len(data)} bytes", f"at most {SMALL_BYTES}")

    async def Generate(self, request: generation_pb2.GenerateRequest, context: _Context) -> None:
        try:
            tenant = self._tenant(context)
            asked = serde.request_from_proto(request, self._router.reader.limits)
            generation = self._router.generate(asked, tenant)
            async with aclosing(generation) as events:
                async for event in events:
                    if isinstance(event, Started):
                        # As initial metadata it would be a message of its own, ahead of the event.
                        context.set_trailing_metadata(tuple(level_headers([event]).items()))
                    writing = context.write(serde.event_to_proto(event))
                    await in_time(writing, self._stall_timeout_s)
        except ColmError as error:
            await abort(context, error)

    async def SetLevel(
        self, request: generation_pb2.SetLevelRequest, context: _Context
    ) -> generation_pb2.SetLevelResponse:
        try:
            tenant = self._tenant(context)
            await self._router.set_level(request.request_id, request.level, tenant)
        except ColmError as error:
            await abort(context, error)
        return generation_pb2.SetLevelResponse()

    async def GetClusterStatus(
        self, request: generation_pb2.ClusterStatusRequest, context: _Context
    ) -> generation_pb2.ClusterStatus:
        try:
            self._tenant(context)
        except ColmError as error:
            await abort(context, error)
        return serde.cluster_status_to_proto(self._router.status())

    def _tenant(self, context: _Context) -> Tenant:
        """The caller; raises Unauthenticated when it is nobody that is known."""
        metadata = dict(context.invocation_metadata() or ())
        authorization = metadata.get("authorization")
        return self._router.tenants.authenticate(
            authorization if isinstance(authorization, str) else None
        )
