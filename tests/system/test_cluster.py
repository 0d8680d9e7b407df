"""The whole product on Ray: client, router, prefill workers, decode worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from colm_serve.client import Client, Finished, Started, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.core import WorkerKind
from colm_serve.errors import InvalidArgument, UnknownModel
from tests.helpers import TINY, generate_alone, make_prompt

LEVELS = range(1, TINY.num_chains + 1)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def tokens_of(client: Client, prompt: tuple[int, ...], **options: object) -> list[int]:
    events = client.generate(token_ids=prompt, temperature=0, ignore_eos=True, **options)  # type: ignore[arg-type]
    return [event.token_id for event in events if isinstance(event, Token)]


def actor_processes(name: str) -> list[psutil.Process]:
    """Processes of this session's own Ray that host an actor of this class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # One that has ended, or ends meanwhile, has no command line any more.
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                found.append(process)
    return found


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 1000])
def test_greedy_tokens_equal_one_process_at_every_level(
    client: Client, model_folder: Path, num_tokens: int
) -> None:
    prompt = make_prompt(num_tokens, seed=num_tokens)
    for level in LEVELS:
        expected = generate_alone(model_folder, prompt, [level] * 8)
        assert tokens_of(client, prompt, level=level, max_tokens=8) == expected
        # The second time the prompt's blocks are found in the prefix cache.
        assert tokens_of(client, prompt, level=level, max_tokens=8) == expected


def test_kv_is_shipped_cold_and_found_warm(client: Client) -> None:
    prompt = make_prompt(100, seed=77)
    usages = []
    for _ in range(2):
        events = list(client.generate(token_ids=prompt, max_tokens=2, temperature=0))
        assert isinstance(events[-1], Finished)
        usages.append(events[-1].usage)
    assert (usages[0].num_cached_tokens, usages[0].num_shipped_tokens) == (0, 99)
    assert (usages[1].num_cached_tokens, usages[1].num_shipped_tokens) == (96, 3)


def test_a_level_move_takes_effect_between_tokens(client: Client, model_folder: Path) -> None:
    prompt = make_prompt(40, seed=5)
    levels, tokens = [], []
    for event in client.generate(
        token_ids=prompt, max_tokens=400, temperature=0, level=1, ignore_eos=True
    ):
        match event:
            case Started():
                request_id = event.request_id
            case Token():
                levels.append(event.level)
                tokens.append(event.token_id)
                if len(tokens) == 4:
                    client.set_level(request_id, 3)
    assert set(levels) == {1, 3}
    assert levels == sorted(levels)
    num_checked = levels.index(3) + 8
    assert tokens[:num_checked] == generate_alone(model_folder, prompt, levels[:num_checked])


def test_the_openai_client_gets_the_same_tokens(
    cluster: Cluster, client: Client, model_folder: Path
) -> None:
    prompt = make_prompt(30, seed=9)
    http = openai.OpenAI(base_url=f"http://{cluster.addresses.http}/v1", api_key="none")
    completion = http.completions.create(
        model=model_folder.name, prompt=list(prompt), max_tokens=8, temperature=0,
        extra_body={"level": 2, "ignore_eos": True},
    )  # fmt: skip
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert [model.id for model in http.models.list()] == [model_folder.name]


def test_health_and_metrics_answer(cluster: Cluster, client: Client) -> None:
    tokens_of(client, make_prompt(5), max_tokens=2)
    assert httpx.get(f"http://{cluster.addresses.http}/health").status_code == 200
    metrics = httpx.get(f"http://{cluster.addresses.http}/metrics").text
    assert "colm:time_to_first_token_seconds" in metrics


def test_bad_requests_are_refused_and_leave_a_neighbour_alone(
    client: Client, model_folder: Path
) -> None:
    prompt = make_prompt(64, seed=3)
    neighbour = client.generate(
        token_ids=prompt, max_tokens=48, temperature=0, level=2, ignore_eos=True
    )
    first = [next(neighbour) for _ in range(4)]
    with pytest.raises(InvalidArgument, match="level"):
        tokens_of(client, prompt, level=9)
    with pytest.raises(InvalidArgument, match="token"):
        tokens_of(client, (10**6,), max_tokens=1)
    with pytest.raises(UnknownModel, match="no-such-model"):
        tokens_of(client, prompt, model="no-such-model")
    tokens = [event.token_id for event in [*first, *neighbour] if isinstance(event, Token)]
    assert tokens == generate_alone(model_folder, prompt, [2] * 48)


def test_a_process_that_is_held_up_is_left_alone(cluster: Cluster, client: Client) -> None:
    before = cluster.view()
    (worker,) = actor_processes("DecodeActor")
    cluster.news()
    told: list[str] = []

    def has_told(line: str) -> bool:
        told.extend(cluster.news())
        return any(line in t for t in told)

    worker.suspend()
    try:
        wait_until(lambda: has_told("decode-0 is busy"))
    finally:
        worker.resume()
    wait_until(lambda: has_told("decode-0 answers again"))
    assert cluster.view().membership == before.membership
    assert len(tokens_of(client, make_prompt(20), max_tokens=8)) == 8


def test_a_killed_prefill_worker_is_replaced(cluster: Cluster, client: Client) -> None:
    before = {m.epoch for m in cluster.view().membership.of_kind(WorkerKind.PREFILL)}
    victims = actor_processes("ConvertibleActor")
    assert len(victims) == 2
    victims[0].kill()
    assert len(tokens_of(client, make_prompt(200, seed=21), max_tokens=8)) == 8

    def is_replaced() -> bool:
        members = cluster.view().membership.of_kind(WorkerKind.PREFILL)
        return len(members) == 2 and {m.epoch for m in members} != before

    wait_until(is_replaced)
    assert cluster.view().num_restarts == 1
    assert len(tokens_of(client, make_prompt(200, seed=22), max_tokens=8)) == 8


def test_a_killed_decode_worker_loses_no_token(
    cluster: Cluster, client: Client, model_folder: Path
) -> None:
    prompt = make_prompt(50, seed=31)
    events = client.generate(
        token_ids=prompt, max_tokens=300, temperature=0, level=3, ignore_eos=True, timeout_s=90
    )
    tokens = []
    for event in events:
        if isinstance(event, Token):
            tokens.append(event.token_id)
            if len(tokens) == 5:
                (victim,) = actor_processes("DecodeActor")
                victim.kill()
    assert tokens == generate_alone(model_folder, prompt, [3] * 300)
