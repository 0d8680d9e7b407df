"""A prompt whose keys and values are no numbers fails alone, and nobody is sent them later."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch

from colm_serve.errors import RowFailed, Unavailable
from colm_serve.model.cpu_model import CpuModel
from colm_serve.prefill_worker.worker import PrefillWorker
from tests.engine.paged import kv_of_whole_model
from tests.helpers import TINY, make_prompt
from tests.prefill_worker.test_service import serving
from tests.worker_clients import Answer, eventually

#: The model makes no numbers of a text that has it; see `poisoned`.
POISON = 96
PROMPT = tuple(token for token in make_prompt(60, seed=8) if token != POISON)[:50]


def poisoned(worker: PrefillWorker) -> None:
    assert isinstance(worker._model, CpuModel)
    for table in worker._model._embeddings:
        table[POISON] = math.nan


def check(folder: Path, answer: Answer, worker: PrefillWorker, prompt: tuple[int, ...]) -> None:
    pool = answer.in_a_pool(worker.layout)
    for layer, (k, v) in kv_of_whole_model(folder, prompt, level=3).items():
        k_read, v_read = pool.read(layer, pool.table([0]), 0, len(prompt))
        torch.testing.assert_close(k_read, k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [0, 20, 50])
async def test_a_prompt_without_numbers_fails_alone(folder: Path, position: int) -> None:
    bad = (*PROMPT[:position], POISON, *PROMPT[position:])
    async with serving(folder, chunk_tokens=16) as (client, worker):
        poisoned(worker)
        good, failure = await asyncio.gather(
            client.frames(client.request(PROMPT)),
            client.frames(client.request(bad)),
            return_exceptions=True,
        )
        assert isinstance(failure, RowFailed)
        assert isinstance(good, Answer)
        check(folder, good, worker, PROMPT)
        for _ in range(2):
            with pytest.raises(RowFailed, match="not all numbers"):
                await client.frames(client.request(bad))
        check(folder, await client.frames(client.request(PROMPT)), worker, PROMPT)
        worker.check_alive()
        await eventually(client.is_idle, "pages come back")


async def test_damaged_blocks_are_not_sent_again(folder: Path) -> None:
    longer = (*PROMPT, 5, 6, 7)
    async with serving(folder) as (client, worker):
        await client.frames(client.request(PROMPT))
        worker.pool._slots[0] = math.nan
        with pytest.raises(RowFailed):
            await client.frames(client.request(longer))
        answer = await client.frames(client.request(longer))
        assert answer.opening.num_cached_tokens == 0
        check(folder, answer, worker, longer)
        again = await client.frames(client.request(longer))
        assert again.opening.num_cached_tokens == 48
        check(folder, again, worker, longer)


async def test_a_worker_whose_model_is_no_number_takes_itself_out(folder: Path) -> None:
    async def run() -> None:
        async with serving(folder) as (client, worker):
            assert isinstance(worker._model, CpuModel)
            worker._model._layers.arrays.gains_LED[TINY.num_layers - 1] = math.nan
            with pytest.raises(Unavailable, match="not all numbers"):
                await client.frames(client.request(PROMPT))
            with pytest.raises(Unavailable):
                worker.check_alive()

    # It broke in the midst of a pass, whose pages are never given back.
    with pytest.raises(AssertionError):
        await run()
