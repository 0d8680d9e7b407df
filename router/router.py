"""The router: lets requests in, checks them, has them served and counts what came of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from colm_serve.config import ClusterConfig
from colm_serve.core import Membership
from colm_serve.errors import ColmError, InvalidArgument, UnknownRequest
from colm_serve.router.admission import Admission
from colm_serve.router.attempts import Attempts
from colm_serve.router.cluster_status import ClusterStatus, cluster_status
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.demand_meter import DemandMeter
from colm_serve.router.detokenizer import Detokenizer
from colm_serve.router.failover import Failover
from colm_serve.router.level_loop import LevelLoop
from colm_serve.router.lifecycle import Clock, Lifecycle
from colm_serve.router.metrics import Metrics
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.model_names import read_model_name
from colm_serve.router.output import Output
from colm_serve.router.overload import PATIENCE_S
from colm_serve.router.placer import Placer
from colm_serve.router.placing.policy import make_policy
from colm_serve.router.planner import Demand, WorkerCosts
from colm_serve.router.poller import StatusPoller
from colm_serve.router.reading.reader import Reader
from colm_serve.router.request import Finished, GenerationEvent, GenerationRequest
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
        self._attempts = Attempts(self.view, self._clients, self._failover)
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
        models = ((model, tokenizer), *variants)
        folders = {
            facts.name: (str(config.folder_of(facts.variant)), facts.max_context)
            for facts, _ in models
        }
        self.reader = Reader(config.limits, folders)
        self._served = {
            facts.name: ServedModel.make(config, facts, its_tokenizer, make_placer(), self.reader)
            for facts, its_tokenizer in models
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
        await self.reader.close()

    async def generate(
        self, request: GenerationRequest, tenant: Tenant = ANYBODY
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Started, the prompt's scores if wanted, a Token for each token, Finished.

        Closing the generator ends the request.

        Raises:
            InvalidArgument: a field has a value that is not allowed; nothing was done.
            UnknownModel: the cluster serves no such model, or not at the level in its name.
            ResourceExhausted: no room in time, here or on any decode worker.
            RateLimited: the tenant has used up one of its limits.
            Unavailable: no decode worker, or too many of them failed.
            ColmError: what a decode worker refused the request with.
        """
        lifecycle = Lifecycle(self._clock)
        try:
            with self._admission.admit(tenant) as ticket:
                model, request = self._model_of(request)
                running = await self._open(request, model, tenant, lifecycle)
                self._meter.arrived(running.checked.sla_class, self._clock())
                self._failover.request_came()
                try:
                    ticket.reserve(len(running.checked.prompt), running.checked.sampling.max_tokens)
                    async with aclosing(self._attempts.serve(running, model.placer)) as events:
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
            InvalidArgument, UnknownModel: as `generate`, of `model` and `level`.
        """
        return self._model_of(request)[0].prompt_text(request.prompt)

    async def set_level(self, request_id: str, level: int, tenant: Tenant = ANYBODY) -> None:
        """Move a running request to another level from its next token on.

        Raises:
            InvalidArgument: the request's class has no such level.
            UnknownRequest: the tenant has no such request under way, or it has just ended.
        """
        running = self._running.get(request_id)
        if running is None or running.tenant != tenant:
            raise UnknownRequest("request_id", request_id, "the id of a request under way")
        self._served[running.model_name].validator.check_level(level, running.checked.sla_class)
        running.set_level(level)
        if running.worker is not None:
            self.view.move(request_id, running.worker, level, is_pinned=True)
        await running.send_level()
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

    def _model_of(self, request: GenerationRequest) -> tuple[ServedModel, GenerationRequest]:
        """The model that is asked for, and the request with the level that its name may say."""
        num_levels = {name: served.facts.num_levels for name, served in self._served.items()}
        name, level = read_model_name(request.model, num_levels)
        if level is None:
            return self._served[name], request
        if request.level not in (None, level):
            raise InvalidArgument("level", request.level, f"none beside model {request.model!r}")
        return self._served[name], replace(request, level=level)

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
        output = Output(checked, model.facts.eos_token_ids, detokenizer, model.token_bytes)
        running = RunningRequest(request_id, checked, model.facts, output, lifecycle, tenant)
        self._running[request_id] = running
        return running
