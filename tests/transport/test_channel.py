"""Servers and channels: where plaintext is refused, and mutual TLS."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest

from colm_serve.config import TlsConfig
from colm_serve.errors import InvalidConfig
from colm_serve.transport.channel import bind, connect, make_server
from tests.transport.certificates import make_ca
from tests.transport.echo import call, echo, serving


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return make_ca(tmp_path_factory.mktemp("cluster")).issue("worker")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_loopback_may_be_plaintext(host: str) -> None:
    async with serving(echo, host=host) as address, connect(address, None) as channel:
        assert not address.endswith(":0")
        assert await call(channel, b"hello") == b"hello"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_plaintext_beyond_loopback_is_refused(host: str) -> None:
    with pytest.raises(InvalidConfig, match=r"loopback.*tls"):
        bind(make_server(), host, 0, None)


async def test_a_name_is_no_bind_address() -> None:
    with pytest.raises(InvalidConfig, match="localhost or an IP address"):
        bind(make_server(), "example.org", 0, None)


async def test_a_taken_port_is_refused() -> None:
    async with serving(echo) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(RuntimeError):
            bind(make_server(), "127.0.0.1", port, None)


async def test_mutual_tls_works_within_one_cluster(tls: TlsConfig) -> None:
    async with serving(echo, tls) as address, connect(address, tls) as channel:
        assert await call(channel, b"hello") == b"hello"


async def refused(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
    return caught.value.code()


async def test_a_client_without_a_certificate_is_refused(tls: TlsConfig) -> None:
    async with serving(echo, tls) as address:
        only_ca = grpc.ssl_channel_credentials(tls.ca_file.read_bytes())
        assert await refused(address, only_ca) is grpc.StatusCode.UNAVAILABLE
        async with connect(address, tls) as channel:
            assert await call(channel) == b"ping", "the refusal broke the server for others"


async def test_a_plaintext_client_is_refused(tls: TlsConfig) -> None:
    async with serving(echo, tls) as address:
        assert await refused(address, None) is grpc.StatusCode.UNAVAILABLE


async def test_a_client_of_another_cluster_is_refused(tls: TlsConfig, tmp_path: Path) -> None:
    foreign = make_ca(tmp_path).issue("worker")
    # It trusts our server, so what is tested is that the server does not trust it.
    stranger = grpc.ssl_channel_credentials(
        tls.ca_file.read_bytes(), foreign.key_file.read_bytes(), foreign.cert_file.read_bytes()
    )
    async with serving(echo, tls) as address:
        assert await refused(address, stranger) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_cluster_is_not_trusted(tls: TlsConfig, tmp_path: Path) -> None:
    foreign = make_ca(tmp_path).issue("worker")
    async with serving(echo, foreign) as address, connect(address, tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
