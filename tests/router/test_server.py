"""The router's servers: start, stop, addresses, TLS, other threads."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from colm_serve.client import AsyncClient, Client
from colm_serve.config import ClusterConfig, RouterConfig, SlaClass, TlsConfig
from colm_serve.core import Membership
from colm_serve.errors import CheckpointError, InvalidConfig, Unavailable
from colm_serve.model.kv_identity import kv_identity
from colm_serve.router.router import Router
from colm_serve.router.server import RouterService, load_router
from colm_serve.transport.host import ServiceThread
from tests.helpers import TINY, make_model_folder
from tests.router.cluster import model_facts, save_tokenizer, scripted_cluster
from tests.router.scripted import VOCAB_SIZE, Script, ScriptedDecode


def bare_service(**changes: object) -> RouterService:
    config = ClusterConfig.model_validate({"model": "toy", **changes})
    return RouterService(config, lambda c: Router(c, model_facts(), None))


async def test_load_router_reads_the_model_folder(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny", replace(TINY, vocab_size=VOCAB_SIZE))
    save_tokenizer(folder)
    router = load_router(ClusterConfig(model=folder))
    assert router.model.name == "tiny"
    assert router.model.num_levels == len(TINY.chains)
    assert router.model.max_context == TINY.max_context
    assert router.model.kv_identity == kv_identity(folder)


def test_load_router_refuses_what_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_router(ClusterConfig(model=tmp_path))
    config = ClusterConfig(
        model=make_model_folder(tmp_path / "tiny"),
        sla_classes={"default": SlaClass(), "vast": SlaClass(min_level=9)},
    )
    with pytest.raises(InvalidConfig, match=r"sla_classes.vast.min_level: 9"):
        load_router(config)


async def test_membership_comes_from_another_thread() -> None:
    worker = ScriptedDecode("d0")
    member = await worker.start()
    service = bare_service()
    host = await asyncio.to_thread(ServiceThread, service)
    service.update_membership(Membership(1, (member,)))

    async with asyncio.timeout(5), AsyncClient(service.grpc_address) as client:
        while not (await client.status()).workers:
            await asyncio.sleep(0.01)
        events = [event async for event in client.generate(token_ids=[5], max_tokens=3)]
    assert len(events) == 5
    await asyncio.to_thread(host.stop)
    await worker.stop()


async def test_stopping_gives_requests_their_grace(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=1)) as cluster:
        body = {"prompt": [5], "max_tokens": 3}
        by_http = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
        stream = cluster.client.generate(token_ids=[5], max_tokens=3)
        events = [await anext(stream), await anext(stream)]
        while len(cluster.worker.requests) < 2:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(cluster.service.stop(5.0))
        await asyncio.sleep(0.05)
        cluster.worker.resume.set()
        events += [event async for event in stream]
        assert len(events) == 5
        assert (await by_http).status_code == 200
        await stopping


async def test_stopping_ends_what_outlasts_its_grace(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=1)) as cluster:
        body = {"prompt": [5], "max_tokens": 3}
        by_http = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
        stream = cluster.client.generate(token_ids=[5], max_tokens=3)
        await anext(stream)
        while len(cluster.worker.requests) < 2:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(cluster.service.stop(0.05), 5)
        assert cluster.router.num_running == 0
        with pytest.raises(Unavailable):
            [event async for event in stream]
        await asyncio.gather(by_http, return_exceptions=True)


async def test_a_taken_port_is_an_error_and_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = bare_service(router={"http_port": taken.getsockname()[1]})
        with pytest.raises(OSError, match="in use"):
            await service.start()
    host, _, port = service.grpc_address.rpartition(":")
    socket.create_server((host, int(port))).close()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, TINY)
    save_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: of another model: it has"):
        RouterService(ClusterConfig(model=folder))


def test_plaintext_stays_on_loopback() -> None:
    with pytest.raises(InvalidConfig, match=r"router.host"):
        ClusterConfig.model_validate({"model": "toy", "router": {"host": "0.0.0.0"}})
    with pytest.raises(InvalidConfig, match=r"router.host"):
        ClusterConfig(model=Path("toy"), router=RouterConfig(host="0.0.0.0"))


async def test_mutual_tls_on_both_ports(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path)
    config = ClusterConfig(model=Path("toy"), tls=tls)
    service = RouterService(config, lambda c: Router(c, model_facts(), None))
    await service.start()
    try:
        async with AsyncClient(service.grpc_address, tls) as client:
            assert (await client.status()).model == "toy"
        with Client(service.grpc_address, tls) as blocking:
            assert (await asyncio.to_thread(blocking.status)).model == "toy"
        trust = ssl.create_default_context(cafile=str(tls.ca_file))
        url = f"https://{service.http_address}/v1/models"
        async with httpx.AsyncClient(verify=trust) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(url)
        trust.load_cert_chain(tls.cert_file, tls.key_file)
        async with httpx.AsyncClient(verify=trust) as http:
            assert (await http.get(url)).status_code == 200
    finally:
        await service.stop(0.1)


def make_certificates(folder: Path) -> TlsConfig:
    """A certificate for 127.0.0.1 that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return TlsConfig(
        ca_file=folder / "cert.pem", cert_file=folder / "cert.pem", key_file=folder / "key.pem"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_answers_do_not_wait_for_acknowledgements(host: str) -> None:
    """Without TCP_NODELAY each answer on a kept-alive connection takes 40 ms longer."""
    service = bare_service(router={"host": host})
    await service.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}") as http:
            await http.get("/v1/models")
            [connection] = service._http.server_state.connections
            taken = connection.transport.get_extra_info("socket")
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        await service.stop(0)
