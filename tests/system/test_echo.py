"""`echo` with logprobs through an OpenAI client, as evaluation harnesses score texts."""

from __future__ import annotations

import math

import openai
import pytest
import torch

from colm_serve.model.checkpoint import load_model
from colm_serve.router.tokenizer import Tokenizer
from tests.system.served import BUNDLED, served

TEXT = "def total(values):\n    return sum(values)\n"


def tokenizer() -> Tokenizer:
    found = Tokenizer.load(BUNDLED)
    assert found is not None
    return found


@torch.inference_mode()
def logprobs_of_text(level: int) -> list[float]:
    token_ids = tokenizer().encode(TEXT)
    model = load_model(BUNDLED).model
    x_TD = model.hidden_states(torch.tensor([token_ids]), [level])
    logprobs_TV = torch.log_softmax(model.logits(x_TD, [len(token_ids)] * level), dim=-1)
    return [float(logprobs_TV[i, token]) for i, token in enumerate(token_ids[1:])]


@pytest.mark.parametrize("level", [1, 4])
async def test_a_text_is_scored_and_nothing_is_made(level: int) -> None:
    async with served() as client:
        reply = await client.completions.create(
            model=BUNDLED.name, prompt=TEXT, echo=True, logprobs=2, max_tokens=0,
            extra_body={"level": level},
        )  # fmt: skip
    choice = reply.choices[0]
    assert choice.text == TEXT
    assert choice.finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == TEXT
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(logprobs_of_text(level), abs=1e-3)
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs[1:])
    assert logprobs.text_offset is not None
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert TEXT[offset : offset + len(token)] == token


async def test_prompt_and_output_follow_each_other() -> None:
    token_ids = list(tokenizer().encode(TEXT))
    async with served() as client:
        plain = await client.completions.create(
            model=BUNDLED.name, prompt=token_ids, logprobs=0, max_tokens=5, temperature=0
        )
        echoed = await client.completions.create(
            model=BUNDLED.name, prompt=token_ids, echo=True, logprobs=0, max_tokens=5,
            temperature=0, n=2,
        )  # fmt: skip
        stream = await client.completions.create(
            model=BUNDLED.name, prompt=token_ids, echo=True, logprobs=0, max_tokens=5,
            temperature=0, stream=True,
        )  # fmt: skip
        chunks = [chunk.choices[0] async for chunk in stream]
        bare = await client.completions.create(
            model=BUNDLED.name, prompt=TEXT, echo=True, max_tokens=5, temperature=0
        )
    output = plain.choices[0]
    assert output.logprobs is not None
    assert output.logprobs.token_logprobs is not None
    for choice in echoed.choices:
        assert choice.text == TEXT + output.text
        assert choice.logprobs is not None
        found = choice.logprobs.token_logprobs
        assert found is not None
        assert len(found) == len(token_ids) + 5
        assert found[-5:] == pytest.approx(output.logprobs.token_logprobs, abs=1e-4)
    assert "".join(chunk.text for chunk in chunks) == TEXT + output.text
    streamed = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    numbers = [n for logprobs in streamed for n in logprobs.token_logprobs or []]
    assert len(numbers) == len(token_ids) + 5
    assert math.isclose(numbers[1], logprobs_of_text(4)[0], abs_tol=1e-3)
    assert bare.choices[0].text == TEXT + output.text
    assert bare.choices[0].logprobs is None


async def test_no_tokens_without_scores_are_refused() -> None:
    async with served() as client:
        with pytest.raises(openai.BadRequestError, match=r"max_tokens.*0 is not allowed"):
            await client.completions.create(
                model=BUNDLED.name, prompt=TEXT, echo=True, max_tokens=0
            )
