"""The decode worker is killed at any point of a request: the client never hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import pytest

from colm_serve.client import Client, Finished, GenerationEvent, Started, Token
from colm_serve.config import ClusterConfig, RouterConfig
from colm_serve.core import Member, Membership, WorkerKind
from colm_serve.prefill_worker.frame_packer import FramePacker
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.router.server import RouterService
from colm_serve.transport.host import ServiceThread
from tests.forked_worker import forked
from tests.helpers import TINY, decode_service, make_model_folder, make_prompt, prefill_service
from tests.router.cluster import save_tokenizer
from tests.router.scripted import VOCAB_SIZE
from tests.trap import StuckAfter, Trap

CONFIG = replace(TINY, vocab_size=VOCAB_SIZE)
CHUNK_TOKENS = 16
NUM_CHUNKS = 10
LEVEL = 3
#: Longer than anything here takes on the busiest machine.
PATIENCE_S = 100.0
PROMPT_TOKENS = NUM_CHUNKS * CHUNK_TOKENS + 1
MAX_TOKENS = 40


def points() -> Iterator[Any]:
    """Where the victim is in the request's course when it dies, and how often that came before."""
    random = Random(5)
    for kind, num, most in (
        ("tokens", 10, MAX_TOKENS - 10),
        ("prefill", 5, NUM_CHUNKS - 1),
        ("transfer", 5, NUM_CHUNKS * CONFIG.num_layers - 1),
    ):
        for point in sorted(random.sample(range(1, most + 1), num)):
            yield pytest.param(kind, point, id=f"{kind} {point}")


@dataclass
class Site:
    """A router, a prefill worker and a decode worker that live on."""

    folder: Path
    router: RouterService
    prefill: Member
    survivor: Member
    version: int = 0

    def join(self, decode: Member) -> None:
        self.version += 1
        self.router.update_membership(Membership(self.version, (decode, self.prefill)))

    def wait_for_workers(self) -> None:
        """Until the router uses both; a prompt without a prefill worker is computed elsewhere."""
        deadline = time.monotonic() + PATIENCE_S
        with Client(self.router.grpc_address) as client:
            while True:
                status = client.status()
                reachable = [worker for worker in status.workers if worker.is_reachable]
                if status.membership_version == self.version and len(reachable) == 2:
                    return
                assert time.monotonic() < deadline, f"not reachable: {status}"
                time.sleep(0.01)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "tiny", CONFIG)
    save_tokenizer(folder)
    # Nothing is decided by how fast the machine happens to be: neither levels, nor who is alive.
    config = RouterConfig(
        status_interval_s=0.02,
        status_timeout_s=PATIENCE_S,
        policy="fixed_level",
        fixed_level=LEVEL,
    )
    with ExitStack() as stack:
        prefill, _ = stack.enter_context(prefill_service(folder, 8, chunk_tokens=CHUNK_TOKENS))
        decode, worker = stack.enter_context(decode_service(folder, 9, frame_timeout_s=PATIENCE_S))
        router = RouterService(ClusterConfig(model=folder, router=config))
        stack.callback(ServiceThread(router).stop)

        def member(kind: WorkerKind, address: str, epoch: int) -> Member:
            return Member(kind, kind.value, address, epoch, worker.kv_identity)

        yield Site(
            folder,
            router,
            prefill=member(WorkerKind.PREFILL, prefill.address, 8),
            survivor=member(WorkerKind.DECODE, decode.address, 9),
        )


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Trap]:
    """Sprung when a token has reached the client, a chunk is begun, a frame is packed."""
    traps = {"tokens": Trap(), "prefill": Trap(), "transfer": Trap()}
    traps["prefill"].watch(monkeypatch, PrefillWorker, "_chunk")
    traps["transfer"].watch(monkeypatch, FramePacker, "_encode_kv")
    return traps


def generate(
    site: Site, prompt: tuple[int, ...], on_token: Callable[[], object]
) -> list[GenerationEvent]:
    events = []
    with Client(site.router.grpc_address) as client:
        for event in client.generate(
            token_ids=prompt,
            max_tokens=MAX_TOKENS,
            seed=3,
            temperature=1.0,
            ignore_eos=True,
            timeout_s=PATIENCE_S,
        ):
            events.append(event)
            if isinstance(event, Token):
                on_token()
    return events


def said(events: list[GenerationEvent]) -> tuple[list[int], list[int], str]:
    tokens = [event for event in events if isinstance(event, Token)]
    text = "".join(event.text for event in events if isinstance(event, Token | Finished))
    return [t.token_id for t in tokens], [t.level for t in tokens], text


@pytest.mark.parametrize(("kind", "point"), list(points()))
def test_the_text_is_that_of_an_undisturbed_run(
    site: Site, traps: dict[str, Trap], kind: str, point: int, request: pytest.FixtureRequest
) -> None:
    prompt = make_prompt(PROMPT_TOKENS, CONFIG, seed=crc32(request.node.name.encode()))
    # However late it is killed, it has not made all tokens by then: a step makes one. Passes over
    # the prompt do not count, as who computes it is not the point.
    stuck = StuckAfter(point if kind == "tokens" else 0)
    with forked("decode", site.folder, before_step=stuck, frame_timeout_s=PATIENCE_S) as victim:
        decode = Member(WorkerKind.DECODE, "victim", victim.address, 1, victim.kv_identity)
        site.join(decode)
        site.wait_for_workers()

        def kill() -> None:
            victim.kill()
            site.join(site.survivor)

        traps[kind].set(point, kill)
        events = generate(site, prompt, traps["tokens"].see)
        assert not victim.process.is_alive()
    kinds = [type(event) for event in events]
    assert kinds == [Started, *[Token] * MAX_TOKENS, Finished]
    assert said(events) == said(generate(site, prompt, lambda: None))
