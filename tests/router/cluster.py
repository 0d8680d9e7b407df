"""A router on real sockets before scripted workers, and the tokenizer they share."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from colm_serve.client import AsyncClient
from colm_serve.config import (
    ClusterConfig,
    RouterConfig,
    SlaClass,
    StandbyConfig,
    TenantConfig,
)
from colm_serve.core import Member, Membership
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.router import Router
from colm_serve.router.server import RouterService
from colm_serve.router.tokenizer import Tokenizer
from tests.router.scripted import (
    END_OF_TEXT,
    KV_IDENTITY,
    NUM_LEVELS,
    VOCAB_SIZE,
    Script,
    ScriptedDecode,
)

MODEL = "toy"
MAX_CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def trained_tokenizer() -> HfTokenizer:
    """Byte-level BPE of VOCAB_SIZE tokens, the special ones first."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "def add(first, second):\n    return first + second  # naïve façade, 東京, 🙂\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.token_to_id(special[0]) == END_OF_TEXT
    return tokenizer


def save_tokenizer(folder: Path, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def model_facts(**changes: Any) -> ModelFacts:
    facts: dict[str, Any] = {
        "name": MODEL,
        "num_levels": NUM_LEVELS,
        "max_context": MAX_CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "kv_identity": KV_IDENTITY,
        "eos_token_ids": (END_OF_TEXT,),
    }
    return ModelFacts(**{**facts, **changes})


@dataclass
class ScriptedCluster:
    """What a test holds of a running cluster."""

    service: RouterService
    router: Router
    workers: list[ScriptedDecode]
    client: AsyncClient
    http: httpx.AsyncClient
    version: int = 0

    @property
    def worker(self) -> ScriptedDecode:
        return self.workers[0]

    async def join(self, members: Sequence[Member]) -> None:
        """Tell the router who is there, as the controller does, and wait until they answer."""
        await self.join_some(members, expected=members)

    async def join_some(self, members: Sequence[Member], expected: Sequence[Member]) -> None:
        """Tell the router who is there; wait until it uses those that are expected."""
        self.version += 1
        self.service.update_membership(Membership(self.version, tuple(members)))
        await self.until(
            lambda: [r.member for r in self.router.view.records if r.is_reachable] == list(expected)
        )

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something about the workers, as the router knows them."""
        async with asyncio.timeout(10):
            while not holds():
                await self.router.view.change().wait()


@asynccontextmanager
async def scripted_cluster(
    folder: Path,
    *,
    num_decode: int = 1,
    script: Script | None = None,
    router: RouterConfig | None = None,
    sla_classes: dict[str, SlaClass] | None = None,
    tenants: dict[str, TenantConfig] | None = None,
    api_key: str | None = None,
    standby: StandbyConfig | None = None,
    has_tokenizer: bool = True,
    patience_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[ScriptedCluster]:
    """A running cluster; fails on exit if a stream, a request or a task is left."""
    before = asyncio.all_tasks()
    config = ClusterConfig(
        model=folder / MODEL,
        router=router or RouterConfig(status_interval_s=0.02),
        sla_classes=sla_classes or {"default": SlaClass()},
        tenants=tenants or {},
        standby=standby or StandbyConfig(),
    )
    if has_tokenizer:
        save_tokenizer(config.model)
    tokenizer = Tokenizer.load(config.model)
    made = Router(config, model_facts(), tokenizer, clock=clock, patience_s=patience_s)
    service = RouterService(config, lambda _: made)
    await service.start()
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    workers = [ScriptedDecode(f"d{i}", script or Script()) for i in range(num_decode)]
    members = [await worker.start() for worker in workers]
    async with (
        AsyncClient(service.grpc_address, api_key=api_key) as client,
        httpx.AsyncClient(
            base_url=f"http://{service.http_address}", timeout=60, headers=headers
        ) as http,
    ):
        cluster = ScriptedCluster(service, made, workers, client, http)
        try:
            if members:
                await cluster.join(members)
            yield cluster
            for worker in cluster.workers:
                await until_closed(worker)
        finally:
            await service.stop(1.0)
            for worker in cluster.workers:
                await worker.stop()
    assert made.num_running == 0
    if left := asyncio.all_tasks() - before:
        # Servers cancel their handlers when they stop, but do not wait for them.
        _, left = await asyncio.wait(left, timeout=2)
    assert not left, f"tasks were left: {left}"


async def until_closed(worker: ScriptedDecode) -> None:
    """Wait until every stream at a worker has ended."""
    async with asyncio.timeout(5):
        while worker.num_open:
            worker.closed.clear()
            await worker.closed.wait()
