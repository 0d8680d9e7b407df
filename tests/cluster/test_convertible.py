"""A prefill worker's process decodes too: until there is a decode worker again, or for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from colm_serve.client import AsyncClient, Client, Finished, Token
from colm_serve.cluster.convertible import ConvertibleActor
from colm_serve.config import ClusterConfig
from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.router.server import RouterService
from colm_serve.transport.host import ServiceThread
from tests.forked_worker import forked
from tests.helpers import generate_alone, make_model_folder, make_prompt

NUM_STREAMS = 4
MAX_TOKENS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": make_model_folder(tmp_path_factory.mktemp("models") / "tiny"),
            "prefill": {"kv_tokens": 4096, "chunk_tokens": 128},
            "decode": {"kv_tokens": 4096},
            "standby": {"kv_tokens": 2048, "after_s": 0.01},
            "router": {"status_interval_s": 0.02},
        }
    )


@pytest.fixture
def actor(config: ClusterConfig) -> Iterator[ConvertibleActor]:
    actor = ConvertibleActor(config, "prefill-0")
    yield actor
    actor.stop()


@pytest.fixture
def router(config: ClusterConfig) -> Iterator[RouterService]:
    service = RouterService(config)
    host = ServiceThread(service)
    yield service
    host.stop()


def tokens_at(router: RouterService, level: int, prompt: tuple[int, ...]) -> list[int]:
    with Client(router.grpc_address) as client:
        events = list(client.generate(token_ids=prompt, max_tokens=8, temperature=0, level=level))
    return [event.token_id for event in events if isinstance(event, Token)]


async def stream(client: AsyncClient, number: int, has_begun: asyncio.Event) -> list[Token]:
    tokens = []
    async for event in client.generate(
        token_ids=make_prompt(40, seed=number),
        max_tokens=MAX_TOKENS,
        temperature=0,
        ignore_eos=True,
        # Half of them insist on more than a standby has.
        min_level=3 if number % 2 else 1,
    ):
        if isinstance(event, Token):
            tokens.append(event)
            has_begun.set()
    assert isinstance(event, Finished)
    return tokens


async def test_when_every_decode_worker_is_killed_texts_are_finished_at_level_1(
    config: ClusterConfig, router: RouterService, actor: ConvertibleActor
) -> None:
    slowly = partial(time.sleep, 0.005)
    with ExitStack() as stack:
        victims = [
            stack.enter_context(forked("decode", config.model, before_block=slowly, epoch=epoch))
            for epoch in (1, 2)
        ]
        prefill = actor.describe()
        decode = [
            Member(WorkerKind.DECODE, f"d{epoch}", v.address, epoch, v.kv_identity)
            for epoch, v in enumerate(victims, 1)
        ]
        router.update_membership(Membership(1, (*decode, prefill)))
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        async with AsyncClient(router.grpc_address) as client:
            streams = [
                asyncio.create_task(stream(client, number, has_begun))
                for number, has_begun in enumerate(begun)
            ]
            await asyncio.gather(*(has_begun.wait() for has_begun in begun))
            for victim in victims:
                victim.kill()
            standby = await asyncio.to_thread(actor.start_standby)
            router.update_membership(Membership(2, (prefill, standby)))
            texts = await asyncio.gather(*streams)
    for number, tokens in enumerate(texts):
        levels = [token.level for token in tokens]
        num_before = levels.count(3)
        assert 0 < num_before < MAX_TOKENS
        assert levels == [3] * num_before + [1] * (MAX_TOKENS - num_before)
        expected = generate_alone(config.model, make_prompt(40, seed=number), levels)
        assert [token.token_id for token in tokens] == expected
    assert actor.num_standby_requests() == 0
    actor.stop_standby()
    assert actor.describe() == prefill, "it prefills as before"


def test_a_standby_can_be_started_again(
    config: ClusterConfig, router: RouterService, actor: ConvertibleActor
) -> None:
    prompt = make_prompt(50)
    expected = generate_alone(config.model, prompt, [1] * 8)
    for version in (1, 2):
        standby = actor.start_standby()
        assert standby.is_standby
        router.update_membership(Membership(version, (actor.describe(), standby)))
        assert tokens_at(router, 1, prompt) == expected
        actor.stop_standby()


def test_a_prefill_worker_becomes_a_decode_worker_with_every_level(
    config: ClusterConfig, router: RouterService, actor: ConvertibleActor
) -> None:
    before = actor.describe()
    decode = actor.become_decode("decode-3")
    assert (decode.kind, decode.worker_id) == (WorkerKind.DECODE, "decode-3")
    assert decode.kv_identity == before.kv_identity
    assert actor.describe() == decode
    router.update_membership(Membership(1, (decode,)))
    prompt = make_prompt(50)
    for level in (1, 2, 3):
        assert tokens_at(router, level, prompt) == generate_alone(config.model, prompt, [level] * 8)
    assert actor.num_requests() == 0
