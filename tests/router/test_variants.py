"""Several models on one chain 1, each with decode workers of its own behind one router."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from colm_serve.client import AsyncClient, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig, RouterConfig, StandbyConfig
from colm_serve.convert.expand import expand
from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.errors import CheckpointError, InvalidArgument, Unavailable, UnknownModel
from colm_serve.model.checkpoint import save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.folder import ModelFolder
from colm_serve.model.kv_identity import check_variant
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.server import RouterService
from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
    prefill_service,
    with_tokens,
)
from tests.model.models import random_model
from tests.router.cluster import save_tokenizer
from tests.router.scripted import KV_IDENTITY, VOCAB_SIZE, decode_status, prefill_status
from tests.worker_clients import decode_client

BASE = replace(TINY, vocab_size=VOCAB_SIZE)
NUM_TOKENS = 12


@dataclass
class Site:
    """A base, its variants "chat", of as many levels, and "code", of one more; and who serves."""

    folders: dict[str, Path]
    router: RouterService
    prefill: PrefillWorker
    client: AsyncClient
    http: httpx.AsyncClient

    async def tokens(
        self, prompt: tuple[int, ...], model: str, level: int | None = None
    ) -> list[int]:
        events = self.client.generate(
            token_ids=prompt, model=model, level=level, max_tokens=NUM_TOKENS, temperature=0.0,
            ignore_eos=True,
        )  # fmt: skip
        return [event.token_id async for event in events if isinstance(event, Token)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = make_model_folder(root / "base", BASE)
    save_tokenizer(base)
    folders = {"base": base}
    for seed, (name, add_chains) in enumerate((("chat", []), ("code", [4])), start=1):
        folders[name] = root / name
        if add_chains:
            expand(base, folders[name], add_chains)
        config = ColmConfig.load(folders[name]) if add_chains else BASE
        tuned = random_model(config, seed)
        save_model(tuned, folders[name], first_chains=[ModelFolder.open(base).chain(1)])
        save_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="module")
def workers(folders: dict[str, Path]) -> Iterator[tuple[PrefillWorker, dict[str, Member]]]:
    with ExitStack() as stack:
        service, prefill = stack.enter_context(prefill_service(folders["base"], 10))
        identity = prefill.kv_identity
        members = {"": Member(WorkerKind.PREFILL, "p", service.address, 10, identity)}
        for epoch, name in enumerate(folders, start=1):
            variant = "" if name == "base" else name
            decode, _ = stack.enter_context(decode_service(folders[name], epoch, variant=variant))
            members[name] = Member(
                WorkerKind.DECODE, name, decode.address, epoch, identity, variant=variant
            )
        yield prefill, members


@asynccontextmanager
async def site(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]], *absent: str
) -> AsyncIterator[Site]:
    prefill, members = workers
    config = ClusterConfig(
        model=folders["base"],
        variants={name: folders[name] for name in ("chat", "code")},
        router=RouterConfig(status_interval_s=0.02),
        standby=StandbyConfig(after_s=0.05),
    )
    router = RouterService(config)
    await router.start()
    present = tuple(member for name, member in members.items() if name not in absent)
    async with (
        AsyncClient(router.grpc_address) as client,
        httpx.AsyncClient(base_url=f"http://{router.http_address}", timeout=20) as http,
    ):
        router.update_membership(Membership(1, present))
        async with asyncio.timeout(10):
            while sum(w.is_reachable for w in (await client.status()).workers) < len(present):
                await asyncio.sleep(0.01)
        try:
            yield Site(folders, router, prefill, client, http)
        finally:
            await router.stop(1.0)


async def test_each_says_what_it_says_alone_and_prefills_are_shared(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]]
) -> None:
    prompt = make_prompt(100, BASE)
    asked = [("base", 3), ("chat", 3), ("chat", 2), ("code", 4), ("code", 3)]
    async with site(folders, workers) as here:
        first = await here.tokens(prompt, "chat", 3)
        before = here.prefill.status()
        texts = await asyncio.gather(*(here.tokens(prompt, *ask) for ask in asked))
        after = here.prefill.status()
    sampling = replace(with_tokens(GREEDY, NUM_TOKENS), ignore_eos=True)
    expected = [
        generate_alone(folders[name], prompt, [level] * NUM_TOKENS, sampling)
        for name, level in asked
    ]
    assert texts == expected
    assert first == texts[1]
    assert len({tuple(text) for text in texts}) == len(asked), "the models differ"
    # The six whole pages that chat's prompt left in the prefill worker's cache served all three.
    assert after.num_cached_tokens - before.num_cached_tokens == len(asked) * 96
    assert after.num_computed_tokens - before.num_computed_tokens == len(asked) * 3


async def test_models_are_listed_and_unknown_ones_are_404(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]]
) -> None:
    async with site(folders, workers) as here:
        listed = (await here.http.get("/v1/models")).json()["data"]
        assert [(m["id"], m["num_levels"]) for m in listed] == [
            ("base", 3),
            ("chat", 3),
            ("code", 4),
        ]
        shown = {w.worker_id: w.variant for w in (await here.client.status()).workers}
        assert shown == {"p": "", "base": "", "chat": "chat", "code": "code"}
        body = {"prompt": [5, 6, 7], "max_tokens": 2, "model": "code", "level": 4}
        assert (await here.http.post("/v1/completions", json=body)).json()["model"] == "code"
        refused = await here.http.post("/v1/completions", json={**body, "model": "chat"})
        assert refused.json()["error"]["param"] == "level", "chat has three"
        for echo in (False, True):
            unknown = {**body, "model": "gpt-9", "echo": echo}
            response = await here.http.post("/v1/completions", json=unknown)
            assert response.status_code == 404
            assert response.json()["error"]["param"] == "model"
        with pytest.raises(UnknownModel):
            await here.tokens((5, 6), "gpt-9", 1)


async def test_a_name_says_variant_and_level_to_both_apis(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]]
) -> None:
    prompt = make_prompt(20, BASE)
    body = {"prompt": list(prompt), "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    asked = {"chat:level-2": ("chat", 2), "code:level-4": ("code", 4), "level-1": ("base", 1)}
    async with site(folders, workers) as here:
        for name, (variant, level) in asked.items():
            replies = [
                (await here.http.post("/v1/completions", json={**body, **model})).json()
                for model in ({"model": name}, {"model": variant, "level": level})
            ]
            assert [reply["model"] for reply in replies] == [variant] * 2
            assert replies[0]["choices"] == replies[1]["choices"]
            assert replies[0]["choices"][0]["level"] == [level] * NUM_TOKENS
            assert await here.tokens(prompt, name) == await here.tokens(prompt, variant, level)
        allowed = (
            "allowed: base (:level-1 to :level-3), chat (:level-1 to :level-3), "
            "code (:level-1 to :level-4)"
        )
        for name in ("chat:level-4", "gpt-9:level-1", "level-9", "code:level-0"):
            message = f"model: {name!r} is not allowed; {allowed}"
            response = await here.http.post("/v1/completions", json={**body, "model": name})
            assert response.status_code == 404
            assert response.json()["error"]["message"] == message
            with pytest.raises(UnknownModel, match=re.escape(message)):
                await here.tokens(prompt, name)
        with pytest.raises(InvalidArgument, match=r"level: 3 .*none beside model 'chat:level-2'"):
            await here.tokens(prompt, "chat:level-2", 3)


async def test_a_variant_that_waits_for_its_worker_holds_up_no_other(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]]
) -> None:
    prompt = make_prompt(20, BASE)
    async with site(folders, workers, "code") as here:
        waiting = asyncio.create_task(here.tokens(prompt, "code", 4))
        await asyncio.sleep(0.05)
        assert len(await here.tokens(prompt, "chat", 3)) == NUM_TOKENS
        assert not waiting.done()
        here.router.update_membership(Membership(2, tuple(workers[1].values())))
        assert len(await waiting) == NUM_TOKENS


async def test_a_standby_stands_in_for_any_variant_at_level_1(
    folders: dict[str, Path], workers: tuple[PrefillWorker, dict[str, Member]]
) -> None:
    prompt = make_prompt(20, BASE)
    sampling = replace(with_tokens(GREEDY, NUM_TOKENS), ignore_eos=True)
    expected = generate_alone(folders["base"], prompt, [1] * NUM_TOKENS, sampling)
    with decode_service(folders["base"], 9, variant=None) as (service, worker):
        standby = Member(
            WorkerKind.DECODE, "s", service.address, 9, worker.kv_identity, is_standby=True
        )
        members = (workers[0], {"standby": standby, **workers[1]})
        async with site(folders, members, "chat", "code") as here:
            # The base's own worker is there, and does not keep the others' standby from them.
            for _ in range(2):
                assert len(await here.tokens(prompt, "base", 3)) == NUM_TOKENS
                for variant in ("chat", "code"):
                    assert await here.tokens(prompt, variant, 1) == expected


async def test_a_worker_that_has_another_variant_s_address_refuses(
    folders: dict[str, Path],
) -> None:
    with decode_service(folders["chat"], variant="chat") as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            request = client.request(make_prompt(20, BASE), 3)
            stream = await client.open(replace(request, variant="code"))
            with pytest.raises(Unavailable, match="variant 'chat', not 'code'"):
                await stream.rest()
            served = await client.open(replace(request, request_id="2", variant="chat"))
            assert len((await served.rest()).tokens) == GREEDY.max_tokens


def test_decode_workers_are_chosen_among_a_variant_s_and_prefill_workers_among_all() -> None:
    members = [
        Member(WorkerKind.DECODE, f"{variant or 'base'}{i}", "", 1, KV_IDENTITY, variant=variant)
        for variant in ("", "chat")
        for i in range(2)
    ]
    prefill = Member(WorkerKind.PREFILL, "p", "", 1, KV_IDENTITY)
    view = ClusterView(KV_IDENTITY)
    view.apply(Membership(1, (*members, prefill)))
    for member in members:
        view.set_status(member, decode_status(), frozenset())
    view.set_status(prefill, prefill_status(), frozenset())
    for variant, chosen in (("", members[:2]), ("chat", members[2:]), ("code", [])):
        assert view.num_decode(variant) == len(chosen)
        for snapshot in (view.candidates((), "", variant), view.roomiest((), "", variant)):
            assert {state.member for state in snapshot.decode} == set(chosen)
            assert [state.member for state in snapshot.prefill] == [prefill]
    assert len(view.snapshot().decode) == 4
    view.apply(Membership(2, (members[2], prefill)))
    assert (view.num_decode(), view.num_decode("chat")) == (0, 1)
    assert view.has_reachable_decode()


def test_only_models_on_the_same_chain_1_are_variants(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    check_variant(folders["code"], folders["base"])
    other = make_model_folder(tmp_path / "other", BASE, seed=9)
    with pytest.raises(CheckpointError, match=r"other: its keys and values are not those"):
        check_variant(other, folders["base"])
    with pytest.raises(CheckpointError, match="not those of"):
        Cluster(ClusterConfig(model=folders["base"], variants={"other": other}))
