"""Brings a request through the cluster: check, place, stream, and fail over."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from colm_serve.config import ClusterConfig
from colm_serve.core import Admitted, Decoded, DecodedToken, FinishReason, Membership, ScoredPrompt
from colm_serve.errors import (
    ColmError,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    UnknownModel,
)
from colm_serve.router.admission import Admission
from colm_serve.router.cluster_status import ClusterStatus, cluster_status
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.demand_meter import DemandMeter
from colm_serve.router.detokenizer import Detokenizer
from colm_serve.router.failover import Failover
from colm_serve.router.level_loop import LevelLoop
from colm_serve.router.lifecycle import Clock, Lifecycle
from colm_serve.router.metrics import Metrics
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.overload import PATIENCE_S
from colm_serve.router.placer import Placer
from colm_serve.router.placing.policy import Placement, make_policy
from colm_serve.router.planner import Demand, WorkerCosts
from colm_serve.router.poller import StatusPoller
from colm_serve.router.request import (
    Finished,
    GenerationEvent,
    GenerationRequest,
)
from colm_serve.router.running import RunningRequest
from colm_serve.router.served_model import ServedModel
from colm_serve.router.tenants import ANYBODY, Tenant, Tenants
from colm_serve.router.tokenizer import Tokenizer
from colm_serve.router.worker_client import WorkerClients


class Router:
    """Serves generations with the workers of a cluster; belongs to one event loop."""

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelFacts,
        tokenizer: Tokenizer | None,
        variants: Sequence[tuple[ModelFacts, Tokenizer | None]] = (),
        *,
        clock: Clock = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.model = model
        self.view = ClusterView(model.kv_identity, config.decode.page_size)
        self._clock = clock
        self._meter = DemandMeter(config.sla_classes, model.num_levels, clock())
        self.tenants = Tenants(config.tenants)
        # As many again may be read and checked, so that nobody who waits keeps others out.
        max_under_way = 2 * config.router.max_concurrent + config.router.max_queued
        self._admission = Admission(max_under_way, self.tenants.all, clock)
        policy = make_policy(config.router)
        self._clients = WorkerClients(config.tls)
        self._poller = StatusPoller(
            self.view,
            self._clients,
            interval_s=config.router.status_interval_s,
            timeout_s=config.router.status_timeout_s,
        )
        self._metrics = Metrics()
        self._failover = Failover(config, self.view, policy, self._metrics, clock)
        placed: set[str] = set()
        make_placer = partial(
            Placer,
            config,
            self.view,
            policy,
            self._failover,
            self.tenants.all,
            placed,
            clock=clock,
            patience_s=patience_s,
        )
        self._served = {
            facts.name: ServedModel.make(config, facts, its_tokenizer, make_placer())
            for facts, its_tokenizer in ((model, tokenizer), *variants)
        }
        self._running: dict[str, RunningRequest] = {}
        is_adaptive = config.router.policy != "fixed_level"
        moves_per_s = config.router.level_moves_per_s if is_adaptive else 0.0
        self._levels = LevelLoop(self.view, self._running, self._metrics, clock, moves_per_s)

    async def update_membership(self, membership: Membership) -> None:
        """Use a newer membership; requests at workers that have left go on elsewhere."""
        self._levels.start()
        self._failover.update_membership(membership)
        await self._poller.update_membership(membership)

    async def close(self) -> None:
        """Stop polling and close every channel; nothing may be under way any more."""
        await self._levels.stop()
        await self._poller.stop()
        await self._clients.close_all()

    async def generate(
        self, request: GenerationRequest, tenant: Tenant = ANYBODY
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Started, the prompt's scores if wanted, a Token for each token, Finished.

        Closing the generator ends the request.

        Raises:
            InvalidArgument: a field has a value that is not allowed; nothing was done.
            UnknownModel: the cluster serves no such model.
            ResourceExhausted: no room in time, here or on any decode worker.
            RateLimited: the tenant has used up one of its limits.
            Unavailable: no decode worker, or too many of them failed.
            ColmError: what a decode worker refused the request with.
        """
        lifecycle = Lifecycle(self._clock)
        try:
            with self._admission.admit(tenant) as ticket:
                model = self._model_of(request)
                running = await self._open(request, model, tenant, lifecycle)
                self._meter.arrived(running.checked.sla_class, self._clock())
                self._failover.request_came()
                try:
                    ticket.reserve(len(running.checked.prompt), running.checked.sampling.max_tokens)
                    async with aclosing(self._serve(running, model.placer)) as events:
                        async for event in events:
                            self._metrics.event(event, lifecycle)
                            if isinstance(event, Finished):
                                self._meter.finished(
                                    running.checked.sla_class, event.usage, self._clock()
                                )
                            yield event
                    if running.num_attempts == 1 and running.prediction is not None:
                        self._metrics.predicted(running.prediction, lifecycle)
                finally:
                    ticket.num_used = running.num_used_tokens
                    model.placer.leave(running)
                    del self._running[running.request_id]
        except ColmError as error:
            self._metrics.failed(error)
            raise

    @property
    def models(self) -> tuple[ModelFacts, ...]:
        """What is served, the cluster's own model first."""
        return tuple(served.facts for served in self._served.values())

    def prompt_text(self, request: GenerationRequest) -> str:
        """What a request's prompt says; empty where token ids stand for no text.

        Raises:
            UnknownModel: the cluster serves no such model.
        """
        return self._model_of(request).prompt_text(request.prompt)

    async def set_level(self, request_id: str, level: int, tenant: Tenant = ANYBODY) -> None:
        """Move a running request to another level from its next token on.

        Raises:
            InvalidArgument: the tenant has no such request under way, or the model no such level.
        """
        running = self._running.get(request_id)
        if running is None or running.tenant != tenant:
            raise InvalidArgument("request_id", request_id, "the id of a request under way")
        self._served[running.model_name].validator.check_level("level", level)
        await running.set_level(level)
        if running.worker is not None:
            self.view.move(request_id, running.worker, level, is_pinned=True)
        self._metrics.level_moved("client")

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def load(self) -> tuple[tuple[Demand, ...], WorkerCosts | None]:
        """What a planner decides on."""
        return self._meter.demands(self._clock()), WorkerCosts.of(self.view.snapshot())

    def status(self) -> ClusterStatus:
        return cluster_status(self.model, self.view)

    def render_metrics(self) -> bytes:
        placers = [served.placer for served in self._served.values()]
        waiting = {t.name: sum(p.num_waiting(t) for p in placers) for t in self.tenants.all}
        return self._metrics.render(self.view, self._admission.num_running, waiting)

    def _model_of(self, request: GenerationRequest) -> ServedModel:
        name = request.model or self.model.name
        if name not in self._served:
            raise UnknownModel("model", name, ", ".join(self._served))
        return self._served[name]

    async def _open(
        self,
        request: GenerationRequest,
        model: ServedModel,
        tenant: Tenant,
        lifecycle: Lifecycle,
    ) -> RunningRequest:
        checked = await model.validator.check(request, tenant.config.sla_classes)
        request_id = uuid.uuid4().hex
        detokenizer = Detokenizer(model.decode_text, checked.stop, checked.sampling.min_tokens)
        running = RunningRequest(
            request_id, checked, model.facts, detokenizer, model.token_bytes, lifecycle, tenant
        )
        self._running[request_id] = running
        return running

    async def _serve(
        self, running: RunningRequest, placer: Placer
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Attempts, one after another, until one comes to the end."""
        while (reason := running.reason_to_end()) is None:
            placement = await self._place(running, placer)
            try:
                async with aclosing(self._attempt(running, placement)) as events:
                    async for event in events:
                        if isinstance(event, Finished):
                            self._failover.succeeded(placement)
                        yield event
                return
            except (Unavailable, DataLoss, ResourceExhausted) as error:
                await self._failover.failed(running, placement, error)
        # The worker was gone after the last token, before it could say that it was the last.
        yield running.finished(reason, None)

    async def _attempt(
        self, running: RunningRequest, placement: Placement
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One Decode call; raises what ended it, unless the request has come to its end."""
        request, work = running.placed(placement)
        call = running.call = self._clients.decode(placement.decode, running.remaining_s)
        self.view.place(running.request_id, placement, work, request.prompt, request.cache_salt)
        has_prompt = False
        try:
            async with aclosing(call.events(request)) as events:
                async for event in events:
                    match event:
                        case Admitted():
                            self.view.admitted(running.request_id, placement)
                            if (started := running.admitted(event)) is not None:
                                yield started
                        case ScoredPrompt():
                            yield running.scored(event)
                            if running.is_scored_only:
                                yield running.finished(FinishReason.LENGTH, None)
                                return
                        case DecodedToken():
                            if not has_prompt:
                                has_prompt = True
                                self.view.prefilled(running.request_id, placement)
                            yield running.token(event)
                            if running.is_stopped:
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
            self.view.cached(placement.decode, running.tokens[:-1], request.cache_salt)
            self.view.release(running.request_id, placement)

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
                    change = self.view.change()
                    try:
                        return self._failover.decide(running)
                    except (Unavailable, ResourceExhausted) as error:
                        trouble = error
                    await change.wait()
                    running.refused_by = frozenset()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{trouble}; waited {patience_s:.1f} s") from error
