"""A request's attempts at decode workers: place, stream, and fail over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from colm_serve.core import Admitted, Decoded, DecodedToken, FinishReason, ScoredPrompt
from colm_serve.errors import (
    ColmError,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    RowFailed,
    Unavailable,
    UnknownRequest,
)
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.failover import Failover
from colm_serve.router.placer import Placer
from colm_serve.router.placing.policy import Placement
from colm_serve.router.request import Finished, GenerationEvent
from colm_serve.router.running import RunningRequest
from colm_serve.router.worker_client import WorkerClients


class Attempts:
    """Brings requests that have been checked through the cluster."""

    def __init__(self, view: ClusterView, clients: WorkerClients, failover: Failover) -> None:
        self._view = view
        self._clients = clients
        self._failover = failover

    async def serve(
        self, running: RunningRequest, placer: Placer
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Attempts, one after another, until one comes to the end."""
        while (reason := running.output.reason_to_end()) is None:
            placement = await self._place(running, placer)
            try:
                async with aclosing(self._attempt(running, placement)) as events:
                    async for event in events:
                        if isinstance(event, Finished):
                            self._failover.succeeded(placement)
                        yield event
                return
            except (InvalidArgument, DeadlineExceeded, RowFailed):
                raise  # Another worker would do the same.
            except ColmError as error:
                await self._failover.failed(running, placement, error)
        # The worker was gone after the last token, before it could say that it was the last.
        yield running.finished(reason, None)

    async def _attempt(
        self, running: RunningRequest, placement: Placement
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One Decode call; raises what ended it, unless the request has come to its end."""
        request, work = running.placed(placement)
        timeout_s = running.remaining_s
        call = running.call = self._clients.decode(placement.decode, request, timeout_s)
        self._view.place(running.request_id, placement, work, request.prompt, request.cache_salt)
        has_prompt = False
        try:
            async with aclosing(call.events()) as events:
                async for event in events:
                    match event:
                        case Admitted():
                            self._view.admitted(running.request_id, placement)
                            started = running.admitted(event)
                            if running.level != placement.level:
                                with suppress(UnknownRequest):
                                    await running.send_level()
                            if started is not None:
                                yield started
                        case ScoredPrompt():
                            yield running.output.scored(event)
                            if running.output.is_scored_only:
                                yield running.finished(FinishReason.LENGTH, None)
                                return
                        case DecodedToken():
                            if not has_prompt:
                                has_prompt = True
                                self._view.prefilled(running.request_id, placement)
                            yield running.token(event)
                            if running.output.is_stopped:
                                yield running.finished(FinishReason.STOP, None)
                                return
                        case Decoded():
                            yield running.finished(event.reason, event)
                            return
            raise DataLoss(f"{placement.decode.worker_id}: the stream ended before the request")
        finally:
            call.cancel()
            running.call = None
            # The last token has no keys and values yet.
            self._view.cached(placement.decode, running.output.tokens[:-1], request.cache_salt)
            self._view.release(running.request_id, placement)

    async def _place(self, running: RunningRequest, placer: Placer) -> Placement:
        """Where to go next.

        A client that has had tokens is owed the rest: its request stands in no line, and waits
        until its deadline.
        """
        if not running.is_resuming:
            return await placer.place(running)
        patience_s = running.remaining_s
        trouble: ColmError | None = None
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    change = self._view.change()
                    try:
                        return self._failover.decide(running)
                    except (Unavailable, ResourceExhausted) as error:
                        trouble = error
                    await change.wait()
                    running.refused_by = frozenset()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{trouble}; waited {patience_s:.1f} s") from error
