"""Workers that follow a script: real gRPC servers, tokens from a hash instead of a model."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    Logprobs,
    Member,
    PrefillCost,
    PrefillStatus,
    StageTimings,
    StepCost,
    TokenLogprob,
    WorkerKind,
)
from colm_serve.errors import ColmError, UnknownRequest
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from colm_serve.transport import serde
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.status import abort

KV_IDENTITY = "scripted"
NUM_LEVELS = 3
VOCAB_SIZE = 300
END_OF_TEXT = 0
#: Ids below are special tokens; the scripts make none of them unless told to.
FIRST_ORDINARY = 4

_Context = grpc.aio.ServicerContext[Any, Any]


def next_token(tokens: Sequence[int], seed: int, level: int) -> int:
    """What the scripted model says after `tokens`; depends on all that it should depend on."""
    digest = zlib.crc32(repr((tuple(tokens), seed, level)).encode())
    return FIRST_ORDINARY + digest % (VOCAB_SIZE - FIRST_ORDINARY)


def continuation(prompt: Sequence[int], num: int, seed: int, level: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num):
        tokens.append(next_token(tokens, seed, level))
    return tokens[len(prompt) :]


def logprobs_of(token: int, num_top: int | None) -> Logprobs | None:
    """The scripted model finds its token likeliest, then those with the next ids."""
    if num_top is None:
        return None
    top = [TokenLogprob((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_top)]
    return Logprobs(TokenLogprob(token, -0.5), tuple(top))


@dataclass
class Script:
    """How a scripted decode worker behaves; a test may change it at any time."""

    fail_start: grpc.StatusCode | None = None
    retry_after_ms: int = 1000
    fail_after: int | None = None  # fail each stream after this many tokens
    fail_with: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    fail_with_error: ColmError | None = None  # instead of `fail_with`
    holds_start: bool = False  # wait for `may_admit` before admitting
    hold_after: int | None = None  # wait for `resume` after this many tokens
    end_of_text_at: int | None = None
    finishes: bool = True  # False: fails between the last token and Decoded
    text: tuple[int, ...] = ()  # say these tokens first
    hangs: bool = False  # never answers GetStatus
    num_cached: int = 0
    hangs_at_moves: bool = False
    fail_moves: grpc.StatusCode | None = None


@dataclass
class ScriptedDecode(decode_pb2_grpc.DecodeServiceServicer):
    """A DecodeService that keeps account of what was asked of it."""

    worker_id: str
    script: Script = field(default_factory=Script)
    epoch: int = 1
    status: DecodeStatus | None = None
    requests: list[DecodeRequest] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    levels: dict[str, int] = field(default_factory=dict)  # of the requests under way
    num_open: int = 0
    num_cancelled: int = 0

    def __post_init__(self) -> None:
        self.may_admit = asyncio.Event()
        self.resume = asyncio.Event()
        self.held = asyncio.Event()
        self.moving = asyncio.Event()
        self.closed = asyncio.Event()

    async def start(self) -> Member:
        self._server = make_server()
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._server)
        address = bind(self._server, "127.0.0.1", 0, None)
        await self._server.start()
        self.member = Member(WorkerKind.DECODE, self.worker_id, address, self.epoch, KV_IDENTITY)
        if self.status is None:
            self.status = decode_status(worker_id=self.worker_id, epoch=self.epoch)
        return self.member

    async def stop(self) -> None:
        """Die: every stream breaks, and nothing answers any more."""
        await self._server.stop(None)

    async def GetStatus(
        self, request: decode_pb2.DecodeStatusRequest, context: _Context
    ) -> decode_pb2.DecodeStatus:
        if self.script.hangs:
            await asyncio.Event().wait()
        assert self.status is not None
        return serde.decode_status_to_proto(self.status)

    async def Decode(self, message: decode_pb2.DecodeStart, context: _Context) -> None:
        self.num_open += 1
        request = serde.decode_start_from_proto(message)
        try:
            self.requests.append(request)
            self.levels[request.request_id] = request.level
            await self._fail(context, self.script.fail_start)
            if self.script.holds_start:
                self.held.set()
                await self.may_admit.wait()
            await self._say(request, context)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1
            del self.levels[request.request_id]
            self.closed.set()

    async def MoveLevel(
        self, request: decode_pb2.MoveLevelRequest, context: _Context
    ) -> decode_pb2.MoveLevelResponse:
        move = serde.move_level_from_proto(request)
        self.moving.set()
        if self.script.hangs_at_moves:
            await asyncio.Event().wait()
        await self._fail(context, self.script.fail_moves)
        if move.request_id not in self.levels:
            await abort(context, UnknownRequest("request_id", move.request_id, "one under way"))
        self.levels[move.request_id] = move.level
        self.moves.append(move.level)
        return decode_pb2.MoveLevelResponse()

    async def _say(self, request: DecodeRequest, context: _Context) -> None:
        await context.write(serde.decode_event_to_proto(Admitted(self.script.num_cached)))
        tokens = list(request.prompt)
        reason = FinishReason.LENGTH
        for position in range(request.sampling.max_tokens):
            await self._follow(position, context)
            level = self.levels[request.request_id]
            token = self._token(position, tokens, request.sampling.seed, level)
            tokens.append(token)
            event = DecodedToken(token, level, logprobs_of(token, request.sampling.logprobs))
            await context.write(serde.decode_event_to_proto(event))
            if token in request.sampling.ending_token_ids((END_OF_TEXT,)):
                reason = FinishReason.STOP
                break
        await self._fail(context, None if self.script.finishes else self.script.fail_with)
        timings = StageTimings(prefill_s=0.5)
        finished = Decoded(reason, self.script.num_cached, 2, timings)
        await context.write(serde.decode_event_to_proto(finished))

    async def _follow(self, position: int, context: _Context) -> None:
        if self.script.hold_after == position:
            self.held.set()
            await self.resume.wait()
        if self.script.fail_after == position:
            if self.script.fail_with_error is not None:
                await abort(context, self.script.fail_with_error)
            await self._fail(context, self.script.fail_with)

    def _token(self, position: int, tokens: list[int], seed: int, level: int) -> int:
        if position < len(self.script.text):
            return self.script.text[position]
        if position == self.script.end_of_text_at:
            return END_OF_TEXT
        return next_token(tokens, seed, level)

    async def _fail(self, context: _Context, code: grpc.StatusCode | None) -> None:
        if code is not None:
            metadata = (("colm-retry-after-ms", str(self.script.retry_after_ms)),)
            await context.abort(code, f"{self.worker_id} fails as scripted", metadata)


@dataclass
class ScriptedPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker that only tells how it is: nobody but decode workers calls the rest."""

    worker_id: str
    num_queued_tokens: int = 0
    epoch: int = 1

    async def start(self) -> Member:
        self._server = make_server()
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)
        address = bind(self._server, "127.0.0.1", 0, None)
        await self._server.start()
        return Member(WorkerKind.PREFILL, self.worker_id, address, self.epoch, KV_IDENTITY)

    async def stop(self) -> None:
        await self._server.stop(None)

    async def GetStatus(
        self, request: prefill_pb2.PrefillStatusRequest, context: _Context
    ) -> prefill_pb2.PrefillStatus:
        status = prefill_status(
            worker_id=self.worker_id,
            epoch=self.epoch,
            num_queued_tokens=self.num_queued_tokens,
            queued_s=self.num_queued_tokens / 10_000,
        )
        return serde.prefill_status_to_proto(status)


def decode_status(**changes: Any) -> DecodeStatus:
    """An idle decode worker with room for 64 pages of 16 tokens."""
    idle = DecodeStatus(
        worker_id="d0",
        epoch=1,
        kv_identity=KV_IDENTITY,
        num_levels=NUM_LEVELS,
        max_rows=8,
        num_waiting=0,
        num_running=(0,) * NUM_LEVELS,
        num_free_pages=64,
        num_pages=64,
        page_size=16,
        step_cost=StepCost((0.010, 0.010, 0.010), (0.001, 0.001, 0.001)),
        prefill_tokens_per_s=1000.0,
        expected_output_tokens=256,
        num_preemptions=3,
        num_drafted=0,
        num_accepted=0,
        num_failed_rows=2,
    )
    return replace(idle, **changes)


def prefill_status(**changes: Any) -> PrefillStatus:
    """An idle prefill worker."""
    idle = PrefillStatus(
        worker_id="p0",
        epoch=1,
        kv_identity=KV_IDENTITY,
        num_running=0,
        num_waiting=0,
        num_queued_tokens=0,
        queued_s=0.0,
        cost=PrefillCost(pass_s=0.0, token_s=1e-4, attended_key_s=0.0, chunk_tokens=512),
        num_free_pages=64,
        num_pages=64,
        num_computed_tokens=0,
        num_cached_tokens=0,
    )
    return replace(idle, **changes)
