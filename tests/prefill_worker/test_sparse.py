"""Sparse prefill in a real worker: what it ships, and what a decode worker makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colm_serve.engine.sparse.pattern_file import HeadPattern, save_patterns
from colm_serve.engine.sparse.selectors import AShape, BlockSparse, Dense, Selector, VerticalSlash
from colm_serve.errors import InvalidConfig
from tests.engine.paged import kv_of_whole_model
from tests.helpers import GREEDY, TINY, decode_service, generate_alone, make_prompt, prefill_service
from tests.worker_clients import decode_client, prefill_client

NUM_HEADS = TINY.heads_per_chain[0]


def with_patterns(folder: Path, *selectors: Selector, min_tokens: int = 1) -> dict[str, Any]:
    """`prefill.sparse` of a file that gives a layer's heads these patterns in turn."""
    path = folder / "patterns.json"
    heads = [HeadPattern(selectors[head % len(selectors)], 1.0) for head in range(NUM_HEADS)]
    save_patterns(path, [heads] * TINY.num_layers)
    return {"selector": "minference", "pattern_file": path, "min_tokens": min_tokens}


async def shipped_keys(folder: Path, prompt: tuple[int, ...], **changes: Any) -> torch.Tensor:
    """The last layer's keys of a prompt, [S, N, H]."""
    with prefill_service(folder, **changes) as (service, worker):
        identity = worker.kv_identity
        async with prefill_client(service.address, identity, worker.layout) as client:
            answer = await client.frames(client.request(prompt))
    pool = answer.in_a_pool(worker.layout)
    return pool.read(TINY.num_layers - 1, pool.table([0]), 0, len(prompt))[0]


@pytest.mark.parametrize("chunk_tokens", [100, 512])
@pytest.mark.parametrize(
    "selectors",
    [(VerticalSlash(0, 2048), BlockSparse(64)), (AShape(0, 2048), Dense()), None],
    ids=["vertical_and_slash-block_sparse", "stream_llm-dense", "adaptive"],
)
async def test_text_at_a_full_budget_is_the_whole_models(
    folder: Path, tmp_path: Path, chunk_tokens: int, selectors: tuple[Selector, ...] | None
) -> None:
    sparse: dict[str, Any] = {"selector": "adaptive", "gamma": 1.0, "min_tokens": 1}
    if selectors is not None:
        sparse = with_patterns(tmp_path, *selectors)
    prompt = make_prompt(430)
    with (
        prefill_service(folder, sparse=sparse, chunk_tokens=chunk_tokens) as (prefill, _),
        decode_service(folder) as (decode, worker),
    ):
        async with decode_client(decode.address, worker.kv_identity) as client:
            for level in range(1, TINY.num_chains + 1):
                got = await client.generate(prompt, level, GREEDY, (prefill.address,))
                assert got.tokens == generate_alone(folder, prompt, [level] * 8)


async def test_prompts_are_sparse_from_their_own_length_on(folder: Path, tmp_path: Path) -> None:
    """The whole prompt counts, not the chunk: the first tokens' keys tell nothing yet."""
    sparse = with_patterns(tmp_path, AShape(0, 0), min_tokens=300)
    long, short = make_prompt(300), make_prompt(299)
    k_short = await shipped_keys(folder, short, sparse=sparse, chunk_tokens=100)
    k_long = await shipped_keys(folder, long, sparse=sparse, chunk_tokens=100)
    dense = kv_of_whole_model(folder, long, level=1)[TINY.num_layers - 1][0]
    torch.testing.assert_close(k_short, dense[:299], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k_long[:64], dense[:64], rtol=1e-4, atol=1e-5)
    assert (k_long[64:100] - dense[64:100]).abs().max() > 0.01, "the first chunk was dense"
    assert (k_long[200:] - dense[200:]).abs().max() > 0.01


async def test_adaptive_prefill_is_near_dense(folder: Path) -> None:
    prompt = make_prompt(600)
    dense = kv_of_whole_model(folder, prompt, level=1)[TINY.num_layers - 1][0]
    errors = []
    for gamma in (0.5, 0.99):
        sparse = {"selector": "adaptive", "gamma": gamma, "min_tokens": 1}
        k = await shipped_keys(folder, prompt, sparse=sparse)
        errors.append(((k - dense).norm() / dense.norm()).item())
    assert 0 < errors[1] < errors[0]
    assert errors[1] < 0.05


def test_patterns_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    save_patterns(path, [[HeadPattern(Dense(), 1.0)]] * TINY.num_layers)
    sparse = {"selector": "minference", "pattern_file": path}
    with (
        pytest.raises(InvalidConfig, match=r"layer 0.*heads 0 to 1 of chain 1"),
        prefill_service(folder, sparse=sparse),
    ):
        pass
