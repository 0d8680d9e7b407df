"""One request under way at the router: what it asked for, and how far it has come."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeRequest,
    FinishReason,
    Member,
    PrefillPeer,
    StageTimings,
)
from colm_serve.errors import ColmError, UnknownRequest
from colm_serve.router.lifecycle import Lifecycle, Stage
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.output import Output
from colm_serve.router.placing.batch import Row
from colm_serve.router.placing.facts import Placement, RequestFacts
from colm_serve.router.placing.latency_model import Prediction
from colm_serve.router.placing.level_moves import mean_limit_s
from colm_serve.router.placing.snapshot import Work
from colm_serve.router.request import Finished, Started, Token, Usage
from colm_serve.router.tenants import ANYBODY, Tenant
from colm_serve.router.validation import CheckedRequest
from colm_serve.router.worker_client import DecodeCall

logger = logging.getLogger(__name__)


class RunningRequest:
    """Outlives the decode workers that serve it: to resume, nothing else is needed."""

    def __init__(
        self,
        request_id: str,
        checked: CheckedRequest,
        model: ModelFacts,
        output: Output,
        lifecycle: Lifecycle,
        tenant: Tenant = ANYBODY,
    ) -> None:
        self.request_id = request_id
        self.checked = checked
        self.output = output
        self.lifecycle = lifecycle
        self.tenant = tenant
        self.call: DecodeCall | None = None
        self.num_attempts = 0
        self.refused_by: frozenset[Member] = frozenset()
        self.failed_at: frozenset[Member] = frozenset()
        self.is_brownout = False  # served below its level because of load
        self.prediction: Prediction | None = None
        self._worker: Member | None = None
        self._is_admitted = False  # by that worker
        self._model = model
        self._level: int | None = None
        self._is_level_set = False
        self._sending_level = asyncio.Lock()
        self._num_cached = 0

    @property
    def model_name(self) -> str:
        return self._model.name

    @property
    def is_resuming(self) -> bool:
        """Whether the client has had tokens, so that the rest are owed to it."""
        return self.output.num_tokens > 0

    @property
    def num_used_tokens(self) -> int:
        """Prompt and output, once a worker has taken the request; 0 before."""
        return len(self.output.tokens) if self.lifecycle.has(Stage.ADMITTED) else 0

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; negative past it."""
        return self.checked.deadline_s - self.lifecycle.age_s()

    @property
    def remaining_ttft_s(self) -> float | None:
        """Seconds until the first token is due, if it is still to come and there is a target."""
        if self.checked.ttft_s is None or self.is_resuming:
            return None
        return max(0.0, self.checked.ttft_s - self.lifecycle.age_s())

    def facts(self) -> RequestFacts:
        """What a policy is to place: what is left of the request.

        A request that resumes keeps its level, for its text to go on as it would have, unless
        only a lower one can be served. One that a client has moved stays where it was moved.
        """
        low, high = self.checked.min_level, self.checked.max_level
        if self._level is not None and (self.is_resuming or self._is_level_set):
            low, high = min(low, self._level), self._level
        return RequestFacts(
            prompt=self.output.tokens,
            max_tokens=self.output.max_tokens_left,
            min_level=high if self._is_level_set else low,
            max_level=high,
            ttft_s=None if self.is_resuming else self.checked.ttft_s,
            tpot_s=self.checked.tpot_s,
            deadline_s=self.checked.deadline_s,
            age_s=self.lifecycle.age_s(),
            is_begun=self.num_attempts > 0,
            heavier_tpot_s=self.checked.heavier_tpot_s,
            own_targets=self.checked.own_targets,
            refused_by=self.refused_by,
            failed_at=self.failed_at,
            variant=self._model.variant,
        )

    @property
    def _is_on_standby(self) -> bool:
        return self._worker is not None and self._worker.is_standby

    @property
    def may_use_standby(self) -> bool:
        """A text that has begun is worth more at level 1 than broken off."""
        return self.is_resuming or self.facts().min_level == 1

    def facts_at_level_1(self) -> RequestFacts:
        """What a policy is to place on a standby, whatever level was asked for."""
        return replace(self.facts(), min_level=1, max_level=1)

    def placed(self, placement: Placement) -> tuple[DecodeRequest, Work]:
        """Note an attempt; returns what to ask of the decode worker, and what that costs."""
        self.num_attempts += 1
        self._worker, self.prediction = placement.decode, placement.prediction
        self._is_admitted = False
        if not self._is_on_standby:
            self._level = placement.level
        self.output.begin_call()
        self.lifecycle.reach(Stage.PLACED)
        prompt = self.output.tokens
        request = DecodeRequest(
            request_id=self.request_id,
            prompt=prompt,
            level=placement.level,
            sampling=self.output.sampling_left(),
            prefill_peers=tuple(PrefillPeer(m.address, m.epoch) for m in placement.prefill),
            kv_identity=self._model.kv_identity,
            num_resumed_tokens=self.output.num_tokens,
            cache_salt=self.checked.cache_salt,
            ttft_s=self.remaining_ttft_s,
            variant=self._model.variant,
        )
        work = Work(
            level=placement.level,
            num_prompt_tokens=len(prompt),
            max_tokens=self.output.max_tokens_left,
            tpot_s=self.checked.tpot_s,
            min_level=placement.level if self._is_level_set else self.checked.min_level,
        )
        return request, work

    @property
    def worker(self) -> Member | None:
        """The decode worker that has it now, if it is one that has other levels too."""
        return None if self.call is None or self._is_on_standby else self._worker

    def row(self) -> Row:
        """What its level is to be decided on; it has one once it has been placed.

        It stays where it is until the worker has admitted it, and where its client has put it.
        """
        assert self._level is not None, "a request at a worker has been placed"
        checked, level = self.checked, self._level
        may_move = self._is_admitted and not self._is_level_set
        mean_s = mean_limit_s(
            tpot_s=checked.tpot_s,
            decode_s=self.lifecycle.decode_s(),
            num_done=max(0, self.output.num_tokens - 1),
            num_left=self.output.max_tokens_left,
            remaining_s=self.remaining_s,
        )
        return Row(
            request_id=self.request_id,
            level=level,
            min_level=checked.min_level if may_move else level,
            max_level=checked.max_level if may_move else level,
            num_attended=len(checked.prompt) + self.output.num_tokens,
            num_left=self.output.max_tokens_left,
            mean_limit_s=mean_s,
            tpot_s=checked.tpot_s,
            weight=checked.weight,
        )

    @property
    def level(self) -> int | None:
        """That of its next token, unless it is at a standby; None before it has been placed."""
        return self._level

    def move_level(self, level: int) -> None:
        """Be at a level until moved again; `send_level` tells the worker of it.

        A standby has level 1 only: the level is then that of the next decode worker.
        """
        self._level = level

    def set_level(self, level: int) -> None:
        """Be at a level, through any failover: only its client moves it again."""
        self._is_level_set = True
        self._level = level

    async def send_level(self) -> None:
        """Have the worker make tokens at the level of now, whichever was to be sent before.

        One that cannot be told is about to be left; the next worker then has the level from the
        beginning.

        Raises:
            UnknownRequest: the last token has been made.
        """
        async with self._sending_level:
            level = self._level
            if self.call is None or level is None or not self._is_movable:
                return
            try:
                await self.call.move_level(level)
            except UnknownRequest:
                raise
            except ColmError as error:
                logger.info("request %s: not told of level %d: %s", self.request_id, level, error)

    @property
    def _is_movable(self) -> bool:
        """Whether its worker knows it, and has other levels."""
        return self._is_admitted and not self._is_on_standby

    def admitted(self, event: Admitted) -> Started | None:
        """The first admission is the client's start; later ones it never hears of."""
        self._is_admitted = True
        self._num_cached = min(event.num_cached_tokens, len(self.checked.prompt))
        if self.lifecycle.has(Stage.ADMITTED):
            return None
        self.lifecycle.reach(Stage.ADMITTED)
        level = 1 if self._is_on_standby else self._level
        assert level is not None, "a request is placed before it is admitted"
        return Started(self.request_id, self._model.name, level, self.is_brownout)

    def token(self, event: DecodedToken) -> Token:
        self.lifecycle.token()
        return self.output.token(event)

    def finished(self, reason: FinishReason, decoded: Decoded | None) -> Finished:
        """The last event; `decoded` is the worker's account, where it gave one."""
        piece = self.output.last_piece()
        self.lifecycle.reach(Stage.FINISHED)
        num_shipped = 0 if decoded is None else decoded.num_shipped_tokens
        ttft_s = self.lifecycle.between_s(Stage.RECEIVED, Stage.FIRST_TOKEN) or 0.0
        decode_s = self.lifecycle.between_s(Stage.FIRST_TOKEN, Stage.FINISHED) or 0.0
        timings = StageTimings(decode_s=decode_s) if decoded is None else decoded.timings
        return Finished(
            reason=FinishReason.STOP if piece.is_stop else reason,
            usage=Usage(
                num_prompt_tokens=len(self.checked.prompt),
                num_cached_tokens=self._num_cached,
                num_shipped_tokens=min(num_shipped, len(self.checked.prompt)),
                num_output_tokens=self.output.num_tokens,
            ),
            timings=replace(timings, ttft_s=ttft_s),
            text=piece.text,
        )
