"""Workers that come, go and change roles on Ray, and prefill workers that stand in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from colm_serve.client import Client, Token
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.core import Membership, WorkerKind
from colm_serve.router.planner import Plan
from tests.helpers import generate_alone, make_prompt
from tests.system.test_cluster import actor_processes, tokens_of, wait_until


@pytest.fixture(scope="module")
def cluster(model_folder: Path) -> Iterator[Cluster]:
    config = ClusterConfig.model_validate(
        {
            "model": model_folder,
            "prefill": {"count": 2, "kv_tokens": 8192, "chunk_tokens": 128},
            "decode": {"count": 1, "kv_tokens": 16384},
            "standby": {"after_s": 0.1, "kv_tokens": 4096},
            "planner": {"enabled": True, "max_prefill": 2, "max_decode": 2, "interval_s": 3600},
            # Shorter than the texts, so that some of them move.
            "ray": {"health_interval_s": 0.2, "drain_s": 0.2},
        }
    )
    with Cluster(config) as cluster:
        yield cluster


class Stream(threading.Thread):
    """A long text on its way; `tokens` grow as they come."""

    def __init__(self, address: str, prompt: tuple[int, ...], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.prompt = prompt
        self.tokens: list[Token] = []
        self._address = address
        self._max_tokens = max_tokens
        self.start()
        wait_until(lambda: len(self.tokens) > 3)

    def run(self) -> None:
        with Client(self._address) as client:
            for event in client.generate(
                token_ids=self.prompt, max_tokens=self._max_tokens, temperature=0,
                ignore_eos=True, timeout_s=90,
            ):  # fmt: skip
                if isinstance(event, Token):
                    self.tokens.append(event)

    def levels(self, folder: Path) -> list[int]:
        """Those of all tokens, once they have come; the tokens are what these levels make."""
        self.join(60)
        levels = [token.level for token in self.tokens]
        assert len(levels) == self._max_tokens
        assert [t.token_id for t in self.tokens] == generate_alone(folder, self.prompt, levels)
        return levels


def members(cluster: Cluster) -> Membership:
    return cluster.view().membership


def worker_ids(cluster: Cluster) -> list[str]:
    return [member.worker_id for member in members(cluster).members]


def follow(cluster: Cluster, num_prefill: int, num_decode: int) -> None:
    plan = Plan(num_prefill, num_decode, (), "as tested")
    ray.get(cluster._controller.follow.remote(plan), timeout=60)


def test_a_prefill_worker_changes_its_role_under_load(
    cluster: Cluster, client: Client, model_folder: Path
) -> None:
    stream = Stream(cluster.addresses.grpc, make_prompt(50, seed=1), 400)
    pids = {process.pid for process in actor_processes("ConvertibleActor")}
    follow(cluster, num_prefill=1, num_decode=2)
    assert worker_ids(cluster) == ["prefill-0", "decode-0", "decode-1"]
    assert {process.pid for process in actor_processes("ConvertibleActor")} == pids
    prompt = make_prompt(60, seed=2)
    assert tokens_of(client, prompt, max_tokens=8) == generate_alone(model_folder, prompt, [3] * 8)
    assert set(stream.levels(model_folder)) == {3}


def test_workers_without_work_go_and_their_texts_are_finished(
    cluster: Cluster, client: Client, model_folder: Path
) -> None:
    streams = [Stream(cluster.addresses.grpc, make_prompt(50, seed=i), 400) for i in (3, 4)]
    plan = ray.get(cluster._controller.plan.remote(), timeout=60)
    assert (plan.num_prefill, plan.num_decode) == (1, 1)
    assert "1 prefill and 1 decode workers" in plan.reason
    assert worker_ids(cluster) == ["prefill-0", "decode-0"]
    assert members(cluster).draining == frozenset()
    wait_until(lambda: len(actor_processes("ConvertibleActor")) == 1)
    for stream in streams:
        assert set(stream.levels(model_folder)) == {3}


def num_placement_groups() -> int:
    groups = ray.util.placement_group_table().values()
    return sum(group["state"] == "CREATED" for group in groups)


def test_workers_are_added_in_places_that_others_have_left_and_in_new_ones(
    cluster: Cluster, client: Client
) -> None:
    assert num_placement_groups() == 1
    follow(cluster, num_prefill=2, num_decode=2)
    assert worker_ids(cluster) == ["prefill-0", "decode-0", "prefill-2", "decode-2"]
    assert num_placement_groups() == 2
    assert len(tokens_of(client, make_prompt(200, seed=5), max_tokens=8)) == 8
    follow(cluster, num_prefill=2, num_decode=1)
    assert worker_ids(cluster) == ["prefill-0", "decode-0", "prefill-2"]
    wait_until(lambda: num_placement_groups() == 1)


def test_without_any_decode_worker_texts_are_finished_at_level_1(
    cluster: Cluster, model_folder: Path
) -> None:
    # Looked for first: the text is made in a second. One that has left may still be ending.
    wait_until(lambda: len(actor_processes("DecodeActor")) == 1)
    (victim,) = actor_processes("DecodeActor")
    stream = Stream(cluster.addresses.grpc, make_prompt(50, seed=6), 600)
    victim.kill()
    levels = stream.levels(model_folder)
    num_before = levels.count(3)
    assert levels == [3] * num_before + [1] * (600 - num_before)
    assert num_before < 600

    def is_as_before() -> bool:
        """The decode worker has been replaced, and the standbys have ended."""
        return worker_ids(cluster) == ["prefill-0", "decode-0", "prefill-2"]

    wait_until(is_as_before)
    assert not any(m.is_standby for m in members(cluster).of_kind(WorkerKind.DECODE))
    assert not psutil.pid_exists(victim.pid)
