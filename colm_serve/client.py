"""A typed client of the router's gRPC API, synchronous and asynchronous.

with Client("127.0.0.1:50051") as client:
    for event in client.generate("def add(a, b):", max_tokens=32):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypedDict, Unpack

import grpc
import grpc.aio

from colm_serve.config import TlsConfig
from colm_serve.core import ScoredPrompt
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.router import serde
from colm_serve.router.cluster_status import ClusterStatus
from colm_serve.router.request import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Prompt,
    Started,
    TextPrompt,
    Token,
    TokenPrompt,
)
from colm_serve.transport.channel import connect
from colm_serve.transport.status import from_rpc_error

__all__ = [
    "AsyncClient",
    "Client",
    "ClusterStatus",
    "Finished",
    "GenerationEvent",
    "Grammar",
    "GrammarKind",
    "Options",
    "ScoredPrompt",
    "Started",
    "Token",
]

#: Longer than any request takes; the cluster's SLA class has the deadline that matters.
DEFAULT_TIMEOUT_S = 3600.0
_CONTROL_TIMEOUT_S = 30.0


class Options(TypedDict, total=False):
    """What `generate` takes besides a text prompt; see colm.v1.GenerateRequest."""

    token_ids: Sequence[int]
    messages: Sequence[Mapping[str, str]]
    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop_token_ids: Sequence[int]
    min_tokens: int
    logprobs: int | None
    grammar: Grammar | None
    prompt_logprobs: int | None
    stop: str | Sequence[str]
    level: int | None
    min_level: int | None
    max_level: int | None
    cache_salt: str
    sla_class: str
    ttft_ms: float | None
    tpot_ms: float | None
    deadline_s: float | None
    add_special_tokens: bool
    parse_special: bool
    timeout_s: float


class Client:
    """Blocks; thread-safe. Its methods raise the errors of `colm_serve.errors`."""

    def __init__(
        self, address: str, tls: TlsConfig | None = None, api_key: str | None = None
    ) -> None:
        self._channel = _connect_blocking(address, tls)
        self._metadata = _metadata(api_key)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; generations under way end."""
        self._channel.close()

    def generate(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> Generator[GenerationEvent, None, None]:
        """Stream a continuation: Started, a Token for each token, Finished.

        One of `prompt`, `token_ids` and `messages` is given. Closing the generator ends the
        generation. Raises InvalidArgument at once for values that cannot be sent.
        """
        return self._events(*_request(prompt, options))

    def set_level(self, request_id: str, level: int) -> None:
        """Move a running generation to another chain level."""
        message = generation_pb2.SetLevelRequest(request_id=request_id, level=level)
        with _our_errors():
            self._stub.SetLevel(message, timeout=_CONTROL_TIMEOUT_S, metadata=self._metadata)

    def status(self) -> ClusterStatus:
        """What the cluster serves, and its workers."""
        with _our_errors():
            message = generation_pb2.ClusterStatusRequest()
            status = self._stub.GetClusterStatus(
                message, timeout=_CONTROL_TIMEOUT_S, metadata=self._metadata
            )
            return serde.cluster_status_from_proto(status)

    def _events(
        self, message: generation_pb2.GenerateRequest, timeout_s: float
    ) -> Generator[GenerationEvent, None, None]:
        call = self._stub.Generate(message, timeout=timeout_s, metadata=self._metadata)
        try:
            with _our_errors():
                for event in call:
                    yield serde.event_from_proto(event)
        finally:
            call.cancel()


class AsyncClient:
    """Belongs to one event loop. Its methods raise the errors of `colm_serve.errors`."""

    def __init__(
        self, address: str, tls: TlsConfig | None = None, api_key: str | None = None
    ) -> None:
        self._channel = connect(address, tls)
        self._metadata = _metadata(api_key)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; generations under way end."""
        await self._channel.close()

    def generate(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """As `Client.generate`, asynchronously."""
        return self._events(*_request(prompt, options))

    async def set_level(self, request_id: str, level: int) -> None:
        """Move a running generation to another chain level."""
        message = generation_pb2.SetLevelRequest(request_id=request_id, level=level)
        with _our_errors():
            await self._stub.SetLevel(message, timeout=_CONTROL_TIMEOUT_S, metadata=self._metadata)

    async def status(self) -> ClusterStatus:
        """What the cluster serves, and its workers."""
        with _our_errors():
            message = generation_pb2.ClusterStatusRequest()
            status = await self._stub.GetClusterStatus(
                message, timeout=_CONTROL_TIMEOUT_S, metadata=self._metadata
            )
            return serde.cluster_status_from_proto(status)

    async def _events(
        self, message: generation_pb2.GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        call = self._stub.Generate(message, timeout=timeout_s, metadata=self._metadata)
        try:
            with _our_errors():
                async for event in call:
                    yield serde.event_from_proto(event)
        finally:
            call.cancel()


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def _request(prompt: str | None, options: Options) -> tuple[generation_pb2.GenerateRequest, float]:
    """The message to send, and the call's timeout in seconds."""
    fields: dict[str, Any] = dict(options)
    timeout_s = fields.pop("timeout_s", DEFAULT_TIMEOUT_S)
    chosen = _prompt(prompt, fields.pop("token_ids", None), fields.pop("messages", None))
    stop = fields.pop("stop", ())
    fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    fields["stop_token_ids"] = tuple(fields.pop("stop_token_ids", ()))
    fields["logit_bias"] = tuple(sorted(fields.pop("logit_bias", {}).items()))
    return serde.request_to_proto(GenerationRequest(prompt=chosen, **fields)), timeout_s


def _prompt(
    text: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
) -> Prompt:
    given = [value for value in (text, token_ids, messages) if value is not None]
    if len(given) != 1:
        raise InvalidArgument(
            "prompt", f"{len(given)} prompts", "one of prompt, token_ids and messages"
        )
    if text is not None:
        return TextPrompt(text)
    if token_ids is not None:
        return TokenPrompt(tuple(token_ids))
    return ChatPrompt(tuple(ChatMessage(m["role"], m["content"]) for m in messages or ()))


def _connect_blocking(address: str, tls: TlsConfig | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(
        tls.ca_file.read_bytes(), tls.key_file.read_bytes(), tls.cert_file.read_bytes()
    )
    return grpc.secure_channel(address, credentials)


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
