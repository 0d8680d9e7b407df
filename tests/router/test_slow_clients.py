"""Clients that stop reading their streams lose them, and hold nothing at the workers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from colm_serve.config import RouterConfig
from colm_serve.errors import DeadlineExceeded
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.router import server
from colm_serve.transport import channel
from colm_serve.transport.status import from_rpc_error
from tests.router import cluster as clusters
from tests.router.cluster import ScriptedCluster, scripted_cluster, until_closed

NUM_TOKENS = 800
#: Of what the servers and the kernel would hold for a client.
SMALL_BYTES = 4096


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a text of some hundred tokens does not fit in what is between router and client."""
    monkeypatch.setattr(clusters, "MAX_CONTEXT", 2 * NUM_TOKENS)
    options = [*channel._SERVER_OPTIONS, ("grpc.http2.write_buffer_size", 1)]
    monkeypatch.setattr(channel, "_SERVER_OPTIONS", options)
    listen = server._listen

    def listen_small(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
        return listener

    monkeypatch.setattr(server, "_listen", listen_small)


@asynccontextmanager
async def impatient(folder: Path) -> AsyncIterator[ScriptedCluster]:
    router = RouterConfig(status_interval_s=0.02, stall_timeout_s=0.5)
    async with scripted_cluster(folder, router=router) as cluster:
        yield cluster


@asynccontextmanager
async def http_stream(cluster: ScriptedCluster) -> AsyncIterator[socket.socket]:
    """The connection of a client that has sent its request and read nothing."""
    host, _, port = cluster.service.http_address.rpartition(":")
    body = {"prompt": [5], "max_tokens": NUM_TOKENS, "logprobs": 5, "stream": True}
    content = json.dumps(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        await loop.sock_sendall(connection, f"{head}{content}".encode())
        yield connection


async def all_over(cluster: ScriptedCluster) -> None:
    """The request has begun, and nothing is held for it any more."""
    async with asyncio.timeout(60):
        while not cluster.worker.requests or cluster.router.num_running:
            await asyncio.sleep(0.01)
    await until_closed(cluster.worker)


async def test_an_http_client_that_takes_nothing_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with impatient(tmp_path) as cluster, http_stream(cluster) as connection:
        await all_over(cluster)
        text = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            try:
                while part := await loop.sock_recv(connection, 65536):
                    text += part
            except ConnectionResetError:
                pass
        others = await cluster.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2})
    assert b"[DONE]" not in text
    assert others.status_code == 200
    assert "took nothing for stall_timeout_s: 0.5: its connection is closed" in caplog.text


async def test_an_http_client_that_reads_on_keeps_its_stream(tmp_path: Path) -> None:
    """However little it takes at a time, and however much waits for it."""
    text = b""
    async with impatient(tmp_path) as cluster, http_stream(cluster) as connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while b"[DONE]" not in text:
                text += await loop.sock_recv(connection, 1024)
        await all_over(cluster)
    assert text.count(b"data: ") == NUM_TOKENS + 2


async def test_a_grpc_client_that_takes_nothing_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = [("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0)]
    async with (
        impatient(tmp_path) as cluster,
        grpc.aio.insecure_channel(cluster.service.grpc_address, options=narrow) as slow,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(slow)
        request = generation_pb2.GenerateRequest(
            prompt_token_ids={"ids": [5]}, sampling={"max_tokens": NUM_TOKENS, "logprobs": 5}
        )
        call = stub.Generate(request)
        await call.read()
        await all_over(cluster)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(call)
    error = from_rpc_error(caught.value)
    assert isinstance(error, DeadlineExceeded)
    assert "stall_timeout_s: 0.5" in str(error)
    assert "took nothing for stall_timeout_s: 0.5" in caplog.text


async def _read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
