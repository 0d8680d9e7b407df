"""Prompt logprobs: every token of the prompt scored at the request's level, in chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colm_serve.core import Logprobs
from colm_serve.decode_worker.turn import Chunk, Row
from colm_serve.errors import InvalidArgument
from tests.decode_worker.scheduling import make_request, make_scheduler
from tests.decode_worker.test_service import cluster
from tests.helpers import GREEDY, generate_alone, make_prompt, whole_model

SCORED = replace(GREEDY, prompt_logprobs=3)


@torch.inference_mode()
def check(folder: Path, prompt: tuple[int, ...], level: int, found: list[Logprobs]) -> None:
    """The whole model says the same of these tokens, without pages, chunks or batch."""
    model = whole_model(folder)
    x_TD = model.hidden_states(torch.tensor([prompt]), [level])
    expected_TV = torch.log_softmax(model.logits(x_TD, [len(prompt)] * level), dim=-1)
    assert [entry.chosen.token_id for entry in found] == list(prompt)
    assert found[0].chosen.logprob is None
    assert not found[0].top
    for row, entry in enumerate(found[1:]):
        own = float(expected_TV[row, prompt[row + 1]])
        assert entry.chosen.logprob == pytest.approx(own, abs=1e-3)
        values, ids = expected_TV[row].topk(3)
        assert [top.token_id for top in entry.top] == ids.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 200])
async def test_scores_are_the_whole_model_s_at_every_level(folder: Path, num_tokens: int) -> None:
    async with cluster(folder, max_batch_tokens=48) as c:
        for level in (1, 2, 3):
            prompt = make_prompt(num_tokens, seed=num_tokens)
            got = await c.decode.generate(prompt, level, SCORED, c.prefill)
            check(folder, prompt, level, got.prompt_logprobs)
            assert got.tokens == generate_alone(folder, prompt, [level] * 8)
            # The second level finds the prompt in the cache, and computes it again all the same.
            assert (got.num_cached, got.num_shipped) == (0, 0)


async def test_a_scored_prompt_is_cached_for_others(folder: Path) -> None:
    prompt = make_prompt(50)
    async with cluster(folder) as c:
        await c.decode.generate(prompt, 2, SCORED)
        got = await c.decode.generate(prompt, 3, GREEDY)
    assert got.num_cached == 48
    assert not got.prompt_logprobs
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_a_number_that_is_not_allowed_is_named(folder: Path) -> None:
    async with cluster(folder) as c:
        request = c.decode.request(make_prompt(5), 1)
        # Past the check of the value itself, as a client of another make would send it.
        object.__setattr__(request.sampling, "prompt_logprobs", 21)
        try:
            with pytest.raises(InvalidArgument, match=r"prompt_logprobs.*21.*0 to 20"):
                await (await c.decode.open(request)).rest()
        finally:
            object.__setattr__(request.sampling, "prompt_logprobs", None)


def test_what_was_scored_before_a_preemption_is_computed_but_not_scored_again() -> None:
    request = make_request(range(20), level=3)
    request = replace(request, sampling=replace(request.sampling, prompt_logprobs=0))
    scheduler = make_scheduler(max_batch_tokens=10)
    sequence = scheduler.admit(request)
    scheduler.start(sequence)
    first = scheduler.next_turn().slices
    assert first == (Chunk(sequence, 10, level=3, num_scored=10),)
    scheduler.complete_turn([()])
    scheduler._preempt(sequence)
    assert scheduler.next_turn().readmitted == (sequence,)
    scheduler.complete_turn([])
    assert sequence.num_computed == 0, "a prompt to score is not looked up in the cache"
    scheduler.start(sequence)
    chunks: list[Row | Chunk] = []
    while sequence.num_missing:
        chunks += scheduler.next_turn().slices
        scheduler.complete_turn([()])
    assert chunks == [Chunk(sequence, 10), Chunk(sequence, 9, level=3, num_scored=9)]
