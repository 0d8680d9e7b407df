"""A body that is too large is refused while it is still being sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.router.cluster import scripted_cluster

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def exchange(address: str, parts: list[bytes]) -> bytes:
    """Send some bytes, and read until the server closes."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("length", ["10000000", "9" * 5000, "9" * 20], ids=len)
async def test_a_length_that_is_too_large_is_refused_before_the_body(
    tmp_path: Path, length: str
) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        head = HEAD + f"Content-Length: {length}\r\n\r\n".encode()
        answer = await exchange(cluster.service.http_address, [head, b'{"prompt": "'])
        if len(length) <= 20:  # What is longer, the HTTP library itself takes for no length.
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"request_too_large" in answer
        assert answer.startswith(b"HTTP/1.1 4")
        assert b"connection: close" in answer.lower()


async def test_a_body_without_a_length_is_refused_where_it_is_too_much(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        parts = [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 12]
        answer = await exchange(cluster.service.http_address, parts)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"over 8388608 bytes" in answer
