"""What the router says of a text that goes on elsewhere, and that it stays the same text."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from colm_serve.client import Token
from colm_serve.config import ClusterConfig, RouterConfig
from colm_serve.core import Member, Membership, SamplingParams, WorkerKind
from colm_serve.decode_worker.service import DecodeService
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.request import GenerationRequest, TokenPrompt
from colm_serve.router.router import Router
from tests.helpers import TINY, decode_service, generate_alone, make_model_folder, make_prompt
from tests.router.cluster import scripted_cluster
from tests.router.scripted import Script, continuation

PROMPT = make_prompt(20)
RULES: dict[str, Any] = {
    "temperature": 2.0,
    "seed": 5,
    "repetition_penalty": 1.1,
    "presence_penalty": 1.0,
    "frequency_penalty": 2.0,
    "logit_bias": tuple((token_id, 40.0) for token_id in range(8)),
    "min_tokens": 10,
}


@pytest.mark.parametrize(("num_before", "min_left"), [(2, 2), (5, 0)])
async def test_the_next_worker_hears_how_many_tokens_are_output(
    tmp_path: Path, num_before: int, min_left: int
) -> None:
    script = Script(
        hold_after=num_before, fail_after=num_before, fail_with=grpc.StatusCode.DATA_LOSS
    )
    async with scripted_cluster(tmp_path, num_decode=2, script=script) as cluster:
        num_tokens = 0
        async for event in cluster.client.generate(
            token_ids=[10, 11], max_tokens=8, seed=1, min_tokens=4
        ):
            num_tokens += isinstance(event, Token)
            if num_tokens == num_before:
                for worker in cluster.workers:
                    if not worker.requests:
                        worker.script = Script()
                    worker.resume.set()
        requests = sorted(
            (r for worker in cluster.workers for r in worker.requests), key=lambda r: len(r.prompt)
        )
    before, after = requests
    assert (before.num_resumed_tokens, before.sampling.min_tokens) == (0, 4)
    assert after.num_resumed_tokens == num_before
    assert after.prompt == (10, 11, *continuation((10, 11), num_before, 1, 3))
    assert after.sampling == replace(before.sampling, max_tokens=8 - num_before,
                                     min_tokens=min_left)  # fmt: skip


def member(service: DecodeService, worker: DecodeWorker, name: str) -> Member:
    epoch = worker.status().epoch
    return Member(WorkerKind.DECODE, name, service.address, epoch, worker.kv_identity)


@pytest.mark.parametrize("num_before", [1, 6, 14])
async def test_a_penalised_text_survives_its_worker(tmp_path: Path, num_before: int) -> None:
    """Real workers: the first is lost in the middle of the text."""
    folder = make_model_folder(tmp_path / "tiny")
    # The prompt takes a pass, each token another; then the first worker is stuck.
    gate = threading.Semaphore(TINY.num_layers * (1 + num_before))
    config = ClusterConfig(model=folder, router=RouterConfig(status_interval_s=0.02))
    with (
        decode_service(folder, 1, before_block=lambda: gate.acquire(timeout=60)) as stuck,
        decode_service(folder, 2) as other,
    ):
        router = Router(config, ModelFacts.of("tiny", TINY, other[1].kv_identity), None)
        await router.update_membership(Membership(1, (member(*stuck, "a"),)))
        tokens: list[int] = []
        request = GenerationRequest(TokenPrompt(PROMPT), max_tokens=24, **RULES)
        async for event in router.generate(request):
            if isinstance(event, Token):
                tokens.append(event.token_id)
                if len(tokens) == num_before:
                    await router.update_membership(Membership(2, (member(*other, "b"),)))
        gate.release(100_000)
        await router.close()
        assert other[1].num_steps == 24 - num_before
    sampling = SamplingParams(max_tokens=24, **RULES)
    assert tokens == generate_alone(folder, PROMPT, [3] * 24, sampling)
