"""A model folder behind a router, for OpenAI clients, without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai

from colm_serve.config import ClusterConfig, SlaClass
from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.router.server import RouterService
from tests.helpers import decode_service

BUNDLED = Path(__file__).parents[2] / "models" / "stdlib-air"


@asynccontextmanager
async def served(model: Path = BUNDLED) -> AsyncIterator[openai.AsyncOpenAI]:
    """A router and one decode worker, both real, in this process; default: the bundled model."""
    config = ClusterConfig(model=model, sla_classes={"default": SlaClass()})
    with decode_service(model, local_prefill_tokens=4096) as (worker_service, worker):
        router = RouterService(config)
        await router.start()
        try:
            member = Member(WorkerKind.DECODE, "d0", worker_service.address, 1, worker.kv_identity)
            router.update_membership(Membership(1, (member,)))
            async with openai.AsyncOpenAI(
                base_url=f"http://{router.http_address}/v1", api_key="none", max_retries=0
            ) as client:
                yield client
        finally:
            await router.stop(1.0)
