"""API keys and quotas, over real HTTP and gRPC."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from typer.testing import CliRunner

from colm_serve.cli import app
from colm_serve.client import AsyncClient, Started
from colm_serve.config import SlaClass, TenantConfig
from colm_serve.errors import InvalidArgument, ResourceExhausted, Unauthenticated
from colm_serve.proto.colm.v1 import generation_pb2, generation_pb2_grpc
from colm_serve.transport.channel import connect
from tests.router.cluster import ScriptedCluster, scripted_cluster
from tests.router.scripted import Script

ACME, BOLT = "sk-acme-0123456789", "sk-bolt-0123456789"
BODY = {"prompt": [10, 11, 12], "max_tokens": 7}
COMPLETION = "/v1/completions"


def tenants(**of_acme: Any) -> dict[str, TenantConfig]:
    acme = TenantConfig.model_validate({"api_keys": [ACME], **of_acme})
    return {"acme": acme, "bolt": TenantConfig.model_validate({"api_keys": [BOLT]})}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def generate(client: AsyncClient, **options: Any) -> int:
    """The number of events."""
    stream = client.generate(token_ids=[10, 11, 12], **{"max_tokens": 7, **options})
    return len([event async for event in stream])


async def test_without_a_key_nothing_is_served(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, tenants=tenants()) as cluster:
        for headers in ({}, bearer("sk-nobody-0123456789")):
            for reply in (
                await cluster.http.post(COMPLETION, json=BODY, headers=headers),
                await cluster.http.post("/v1/chat/completions", content=b"{", headers=headers),
                await cluster.http.get("/v1/models", headers=headers),
            ):
                assert reply.status_code == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                error = reply.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                assert error["message"].startswith("authorization: ")
        for call in (generate(cluster.client), cluster.client.status(),
                     cluster.client.set_level("x", 1)):  # fmt: skip
            with pytest.raises(Unauthenticated, match="an API key is needed"):
                await call
        assert (await cluster.http.get("/health")).status_code == 200
        assert cluster.worker.requests == []


async def test_with_its_key_a_tenant_is_served(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, tenants=tenants(), api_key=ACME) as cluster:
        assert (await cluster.http.post(COMPLETION, json=BODY)).status_code == 200
        assert (await cluster.http.get("/v1/models")).status_code == 200
        assert await generate(cluster.client) == 9
        assert len((await cluster.client.status()).workers) == 1


async def test_the_command_line_takes_a_key_from_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted_cluster(tmp_path, tenants=tenants()) as cluster:
        command = ["status", "--address", cluster.service.grpc_address]
        monkeypatch.setenv("COLM_API_KEY", ACME)
        served = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert served.exit_code == 0
        assert "d0" in served.output
        monkeypatch.setenv("COLM_API_KEY", "sk-nobody-0123456789")
        refused = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert isinstance(refused.exception, Unauthenticated)


async def test_a_tenant_has_classes_of_its_own(tmp_path: Path) -> None:
    classes = {"default": SlaClass(), "cheap": SlaClass(max_level=1), "mid": SlaClass(max_level=2)}
    of_acme = tenants(sla_classes=["cheap", "mid"])
    async with scripted_cluster(
        tmp_path, tenants=of_acme, sla_classes=classes, api_key=ACME
    ) as cluster:
        levels = []
        for body in (BODY, {**BODY, "sla_class": "mid"}):
            reply = await cluster.http.post(COMPLETION, json=body)
            levels.append(reply.headers["colm-level"])
        assert levels == ["1", "2"]
        with pytest.raises(InvalidArgument, match=r"sla_class: 'default'.*allowed: cheap, mid"):
            await generate(cluster.client, sla_class="default")
        other = await cluster.http.post(COMPLETION, json=BODY, headers=bearer(BOLT))
        assert other.headers["colm-level"] == "3"


async def test_quotas_are_each_tenants_own(tmp_path: Path) -> None:
    of_acme = tenants(tokens_per_min=25)
    async with scripted_cluster(tmp_path, tenants=of_acme, api_key=ACME) as cluster:
        for _ in range(2):
            assert (await cluster.http.post(COMPLETION, json=BODY)).status_code == 200
        refused = await cluster.http.post(COMPLETION, json=BODY)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "tokens_per_min: tenant 'acme' has 5 of 25" in refused.json()["error"]["message"]
        assert 10 <= int(refused.headers["retry-after"]) <= 12, "5 of 10 are there, 25 a minute"
        with pytest.raises(ResourceExhausted, match="tokens_per_min") as error:
            await generate(cluster.client)
        assert error.value.retry_after_s == pytest.approx(12, abs=2)
        with pytest.raises(InvalidArgument, match=r"max_tokens: 23 .*up to 25 tokens"):
            await generate(cluster.client, max_tokens=23)
        other = await cluster.http.post(COMPLETION, json=BODY, headers=bearer(BOLT))
        assert other.status_code == 200
        page = await cluster.http.get("/metrics")
        assert 'colm:request_refusals_total{reason="quota"} 2.0' in page.text


async def test_what_was_not_said_is_not_paid(tmp_path: Path) -> None:
    script = Script(end_of_text_at=0)
    of_acme = tenants(tokens_per_min=25)
    async with scripted_cluster(tmp_path, script=script, tenants=of_acme, api_key=ACME) as cluster:
        for _ in range(4):  # 3 + 1 tokens each, of 20 that each may take
            assert await generate(cluster.client, max_tokens=10) == 3


async def test_requests_at_a_time_are_bounded(tmp_path: Path) -> None:
    script, of_acme = Script(hold_after=0), tenants(max_concurrent=1)
    async with scripted_cluster(tmp_path, script=script, tenants=of_acme, api_key=ACME) as cluster:
        async with aclosing(cluster.client.generate(token_ids=[5])) as events:
            await anext(events)
            with pytest.raises(ResourceExhausted, match="max_concurrent"):
                await generate(cluster.client)
        cluster.worker.script = Script()
        assert await until_served(cluster) == 9


async def until_served(cluster: ScriptedCluster) -> int:
    """The client's cancellation takes a moment to reach the router."""
    while cluster.router.num_running:
        await cluster.router.view.change().wait()
    return await generate(cluster.client)


async def test_only_its_own_requests_can_be_moved(tmp_path: Path) -> None:
    script = Script(hold_after=0)
    async with (
        scripted_cluster(tmp_path, script=script, tenants=tenants(), api_key=ACME) as cluster,
        aclosing(cluster.client.generate(token_ids=[5])) as events,
    ):
        started = await anext(events)
        assert isinstance(started, Started)
        async with AsyncClient(cluster.service.grpc_address, api_key=BOLT) as other:
            with pytest.raises(InvalidArgument, match="request_id"):
                await other.set_level(started.request_id, 1)
        await cluster.client.set_level(started.request_id, 1)


async def test_grpc_status_and_metadata(tmp_path: Path) -> None:
    async with (
        scripted_cluster(tmp_path, tenants=tenants()) as cluster,
        connect(cluster.service.grpc_address, None) as channel,
    ):
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(prompt="x", max_level=2)
        refused = stub.Generate(request, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await refused.read()
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {ACME}"),)
        served = stub.Generate(request, timeout=5, metadata=metadata)
        async for _ in served:
            pass
        told = dict(await served.trailing_metadata())
        assert (told["colm-level"], told["colm-brownout"]) == ("2", "false")


async def test_a_batch_takes_no_more_than_its_tenant_may(tmp_path: Path) -> None:
    async with scripted_cluster(
        tmp_path, tenants=tenants(max_concurrent=1), api_key=ACME
    ) as cluster:
        body = {**BODY, "prompt": [[10], [11], [12]], "n": 2}
        reply = await cluster.http.post(COMPLETION, json=body)
        assert reply.status_code == 200
        assert len(reply.json()["choices"]) == 6


async def test_requests_that_come_together_get_no_more_than_there_is(tmp_path: Path) -> None:
    async with scripted_cluster(
        tmp_path, tenants=tenants(tokens_per_min=100), api_key=ACME
    ) as cluster:
        calls = [generate(cluster.client) for _ in range(30)]  # of ten tokens each
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert ends.count(9) == 10
    assert sum(isinstance(end, ResourceExhausted) for end in ends) == 20
