"""Plain-value clients of prefill and decode workers, for tests that go over real gRPC."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from colm_serve.config import TlsConfig
from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    DecodeStatus,
    KvLayout,
    Logprobs,
    MoveLevel,
    PrefillPeer,
    PrefillRequest,
    PrefillStatus,
    SamplingParams,
    ScoredPrompt,
)
from colm_serve.kv.pool import KvPool
from colm_serve.proto.colm.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2
from colm_serve.transport import kv_frames, serde
from colm_serve.transport.channel import connect
from colm_serve.transport.codecs import get_codec
from colm_serve.transport.status import from_rpc_error
from tests.helpers import GREEDY

STREAM_ID = 0x0123456789ABCDEF


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 20.0
) -> None:
    """Wait until `condition` holds; fail, saying `what`, when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


@dataclass
class Generation:
    """What came back of one Decode call."""

    tokens: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    num_cached: int = 0
    end: Decoded | None = None

    def take(self, event: DecodeEvent) -> None:
        match event:
            case Admitted():
                self.num_cached = event.num_cached_tokens
            case ScoredPrompt():
                assert not self.tokens, "the prompt's scores come before the first token"
                self.prompt_logprobs += event.logprobs
            case DecodedToken():
                self.tokens.append(event.token_id)
                self.levels.append(event.level)
            case Decoded():
                self.end = event

    @property
    def num_shipped(self) -> int:
        assert self.end is not None, "the stream has not ended"
        return self.end.num_shipped_tokens


class DecodeStream:
    """One open Decode call."""

    def __init__(self, stub: decode_pb2_grpc.DecodeServiceStub, message: decode_pb2.DecodeStart):
        self._stub = stub
        self._request_id = message.request_id
        self.call: grpc.aio.UnaryStreamCall[Any, Any] = stub.Decode(message)
        self.got = Generation()

    async def move_level(self, level: int) -> None:
        message = serde.move_level_to_proto(MoveLevel(self._request_id, level))
        try:
            await self._stub.MoveLevel(message, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def next(self) -> DecodeEvent | None:
        """The next event, None at the end; a failed call raises the error of our tree."""
        try:
            message = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if not isinstance(message, decode_pb2.DecodeEvent):
            return None
        event = serde.decode_event_from_proto(message)
        self.got.take(event)
        return event

    async def tokens(self, num_tokens: int) -> None:
        """Read until this many tokens have come in all."""
        while len(self.got.tokens) < num_tokens:
            assert await self.next() is not None, "the stream ended early"

    async def rest(self) -> Generation:
        while await self.next() is not None:
            pass
        return self.got

    def cancel(self) -> None:
        self.call.cancel()


class DecodeClient:
    """Calls one decode worker."""

    def __init__(self, channel: grpc.aio.Channel, kv_identity: str) -> None:
        self.stub = decode_pb2_grpc.DecodeServiceStub(channel)
        self.kv_identity = kv_identity
        self._num_requests = 0

    def request(
        self,
        prompt: tuple[int, ...],
        level: int = 1,
        sampling: SamplingParams = GREEDY,
        prefill: tuple[str, ...] = (),
    ) -> DecodeRequest:
        self._num_requests += 1
        request_id = f"request-{self._num_requests}"
        peers = tuple(PrefillPeer(address) for address in prefill)
        return DecodeRequest(request_id, prompt, level, sampling, peers, self.kv_identity)

    async def open(self, request: DecodeRequest) -> DecodeStream:
        return DecodeStream(self.stub, serde.decode_start_to_proto(request))

    async def generate(
        self,
        prompt: tuple[int, ...],
        level: int = 1,
        sampling: SamplingParams = GREEDY,
        prefill: tuple[str, ...] = (),
    ) -> Generation:
        stream = await self.open(self.request(prompt, level, sampling, prefill))
        return await stream.rest()

    async def status(self) -> DecodeStatus:
        return serde.decode_status_from_proto(
            await self.stub.GetStatus(decode_pb2.DecodeStatusRequest(), timeout=10)
        )

    async def is_idle(self) -> bool:
        """Every page is free and nothing waits or runs."""
        status = await self.status()
        return (
            status.num_free_pages == status.num_pages
            and status.num_waiting == 0
            and not any(status.num_running)
        )


@dataclass(frozen=True)
class Answer:
    """The frames of one Prefill call, each KV frame with its payload."""

    opening: kv_frames.OpenFrame
    kv: list[tuple[kv_frames.KvFrame, memoryview]]
    num_waits: int
    end: kv_frames.EndFrame

    @classmethod
    def read(cls, messages: list[bytes]) -> Answer:
        (opening, _), *between, (end, _) = (
            kv_frames.decode(message, STREAM_ID, i) for i, message in enumerate(messages)
        )
        assert isinstance(opening, kv_frames.OpenFrame)
        assert isinstance(end, kv_frames.EndFrame)
        kv = [(frame, data) for frame, data in between if isinstance(frame, kv_frames.KvFrame)]
        waits = [frame for frame, _ in between if isinstance(frame, kv_frames.WaitFrame)]
        assert len(kv) + len(waits) == len(between), "an opening or end amid the stream"
        return cls(opening, kv, len(waits), end)

    def in_a_pool(self, layout: KvLayout) -> KvPool:
        """What came, in a pool of one page that holds all tokens."""
        pool = KvPool(layout, 1, max(frame.start + frame.num_tokens for frame, _ in self.kv))
        codec = get_codec(self.opening.codec)
        for frame, payload in self.kv:
            k_SNH, v_SNH = codec.decode(payload, layout, frame.num_tokens)
            pool.write(frame.layer, pool.table([0]), frame.start, k_SNH, v_SNH)
        return pool


class PrefillClient:
    """Calls one prefill worker."""

    def __init__(
        self, channel: grpc.aio.Channel, address: str, kv_identity: str, layout: KvLayout
    ) -> None:
        self.address = address
        self._prefill: grpc.aio.UnaryStreamMultiCallable[Any, bytes] = channel.unary_stream(
            "/colm.v1.PrefillService/Prefill",
            request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
            response_deserializer=bytes,
        )
        self._lane: grpc.aio.UnaryStreamMultiCallable[Any, bytes] = channel.unary_stream(
            "/colm.v1.PrefillService/PrefillLane",
            request_serializer=prefill_pb2.PrefillLaneRequest.SerializeToString,
            response_deserializer=bytes,
        )
        self._status = channel.unary_unary(
            "/colm.v1.PrefillService/GetStatus",
            request_serializer=prefill_pb2.PrefillStatusRequest.SerializeToString,
            response_deserializer=prefill_pb2.PrefillStatus.FromString,
        )
        self.kv_identity = kv_identity
        self.layout = layout

    def request(self, tokens: tuple[int, ...], ship_from: int = 0) -> PrefillRequest:
        return PrefillRequest(
            "a request", tokens, ship_from, self.kv_identity, self.layout, stream_id=STREAM_ID
        )

    def open(
        self, request: PrefillRequest, timeout_s: float | None = None
    ) -> grpc.aio.UnaryStreamCall[Any, bytes]:
        return self._prefill(serde.prefill_request_to_proto(request), timeout=timeout_s)

    def open_lane(self, stream_id: int, lane: int) -> grpc.aio.UnaryStreamCall[Any, bytes]:
        return self._lane(prefill_pb2.PrefillLaneRequest(stream_id=stream_id, lane=lane))

    async def messages(self, request: PrefillRequest) -> list[bytes]:
        """Every message of a Prefill call, as it was on the wire."""
        try:
            return [message async for message in self.open(request)]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def frames(self, request: PrefillRequest) -> Answer:
        return Answer.read(await self.messages(request))

    async def status(self) -> PrefillStatus:
        message = await self._status(prefill_pb2.PrefillStatusRequest(), timeout=10)
        return serde.prefill_status_from_proto(message)

    async def is_idle(self) -> bool:
        status = await self.status()
        return (
            status.num_free_pages == status.num_pages
            and status.num_waiting == status.num_running == status.num_queued_tokens == 0
        )


@asynccontextmanager
async def decode_client(
    address: str, kv_identity: str, tls: TlsConfig | None = None
) -> AsyncIterator[DecodeClient]:
    async with connect(address, tls) as channel:
        yield DecodeClient(channel, kv_identity)


@asynccontextmanager
async def prefill_client(
    address: str, kv_identity: str, layout: KvLayout, tls: TlsConfig | None = None
) -> AsyncIterator[PrefillClient]:
    async with connect(address, tls) as channel:
        yield PrefillClient(channel, address, kv_identity, layout)
