"""What lm-evaluation-harness 0.4.13 sends and reads (`local-completions`), at each level.

The harness itself runs in benchmarks/evaluation_harness.py: it brings too many packages for a test.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

from colm_serve.router.tokenizer import Tokenizer
from tests.helpers import whole_model
from tests.system.served import BUNDLED, served

CONTEXTS = ["import os\n\n\ndef exists(path):\n", "for name in sorted(names):\n"]
CONTINUATIONS = ["    return os.path.exists(path)\n", "    print(name)\n"]


def tokenized() -> list[tuple[list[int], list[int]]]:
    tokenizer = Tokenizer.load(BUNDLED)
    assert tokenizer is not None
    return [
        (list(tokenizer.encode(context)), list(tokenizer.encode(continuation)))
        for context, continuation in zip(CONTEXTS, CONTINUATIONS, strict=True)
    ]


def loglikelihoods(reply: Any, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """A continuation's log-probability and whether it is the greedy one, as the harness reads."""
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    found = []
    for choice, start in zip(choices, context_lengths, strict=True):
        chosen = choice["logprobs"]["token_logprobs"][start:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        found.append((sum(chosen), chosen == best))
    return found


@torch.inference_mode()
def expected_loglikelihood(
    context: list[int], continuation: list[int], level: int
) -> tuple[float, bool]:
    model = whole_model(BUNDLED)
    tokens = context + continuation
    x_TD = model.hidden_states(torch.tensor([tokens]), [level])[len(context) - 1 : -1]
    logprobs_TV = model.logits(x_TD, [len(continuation)] * level).log_softmax(dim=-1)
    chosen_T = logprobs_TV.gather(1, torch.tensor(continuation)[:, None])
    is_greedy = logprobs_TV.argmax(dim=-1).tolist() == continuation
    return float(chosen_T.sum()), is_greedy


async def post(url: str, body: dict[str, Any]) -> Any:
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_continuations_are_scored_at_the_level_that_the_model_s_name_says() -> None:
    pairs = tokenized()
    totals = []
    async with served() as client:
        for level in (1, 2, 4):
            reply = await post(
                f"{client.base_url}completions",
                {
                    "model": f"{BUNDLED.name}:level-{level}",
                    "prompt": [context + continuation for context, continuation in pairs],
                    "temperature": 0,
                    "max_tokens": 1,
                    "logprobs": 1,
                    "seed": 1234,
                    "echo": True,
                },
            )
            found = loglikelihoods(reply, [len(context) for context, _ in pairs])
            for (score, is_greedy), (context, continuation) in zip(found, pairs, strict=True):
                expected, is_expected_greedy = expected_loglikelihood(context, continuation, level)
                assert score == pytest.approx(expected, abs=1e-3)
                assert is_greedy == is_expected_greedy
            totals.append(sum(score for score, _ in found))
    assert totals == sorted(totals), "a higher level finds true text likelier"
