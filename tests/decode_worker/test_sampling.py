"""Sampling rules over real gRPC: what ends a text, penalties, logprobs, and resuming elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_serve.core import Decoded, DecodedToken, FinishReason, Logprobs, SamplingParams
from colm_serve.errors import InvalidArgument
from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
    next_logits,
    whole_model,
    with_tokens,
)
from tests.worker_clients import DecodeClient, decode_client

PROMPT = make_prompt(30)
#: A few tokens far above the rest, so that they come again and their penalties decide.
PENALISED = SamplingParams(
    max_tokens=24,
    temperature=2.0,
    seed=5,
    min_p=0.001,
    repetition_penalty=1.1,
    presence_penalty=1.0,
    frequency_penalty=2.0,
    logit_bias=tuple((token_id, 40.0) for token_id in range(8)),
    min_tokens=10,
)


async def text(
    client: DecodeClient, sampling: SamplingParams, prompt: tuple[int, ...] = PROMPT
) -> list[int]:
    return (await client.generate(prompt, 3, sampling)).tokens


@pytest.mark.parametrize("sampling", [PENALISED, replace(PENALISED, temperature=0)])
async def test_a_batch_of_rules_gives_each_its_own_text(
    folder: Path, sampling: SamplingParams
) -> None:
    samplings = [
        sampling,
        GREEDY,
        replace(sampling, repetition_penalty=1.5),
        replace(GREEDY, temperature=0.9),
        replace(sampling, logprobs=4, frequency_penalty=-2.0, presence_penalty=0.0),
    ]
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            got = await asyncio.gather(*(text(client, each) for each in samplings))
    expected = [generate_alone(folder, PROMPT, [3] * each.max_tokens, each) for each in samplings]
    assert got == expected
    assert len({tuple(tokens) for tokens in got}) == len(got), "the rules change nothing"
    plain = generate_alone(folder, PROMPT, [3] * 24, with_tokens(GREEDY, 24))
    assert len(set(plain) & set(range(8))) < len(set(got[0]) & set(range(8)))


@pytest.mark.parametrize("num_before", [1, 7, 12])
async def test_a_text_resumed_elsewhere_goes_on_as_it_would_have(
    folder: Path, num_before: int
) -> None:
    whole = generate_alone(folder, PROMPT, [3] * 24, PENALISED)
    rest = replace(
        PENALISED, max_tokens=24 - num_before, min_tokens=max(0, 10 - num_before), logprobs=0
    )
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            request = client.request((*PROMPT, *whole[:num_before]), 3, rest)
            resumed = await client.open(replace(request, num_resumed_tokens=num_before))
            forgotten = await client.open(request)
            assert (await resumed.rest()).tokens == whole[num_before:]
            changed = (await forgotten.rest()).tokens
    if num_before > 1:
        assert changed != whole[num_before:], "the output before does not count"


async def test_stop_tokens_end_a_text_but_not_before_min_tokens(tmp_path: Path) -> None:
    plain = make_model_folder(tmp_path / "plain")
    greedy = replace(GREEDY, max_tokens=12)
    tokens = generate_alone(plain, PROMPT, [3] * 12, greedy)
    stop, eos = tokens[2], tokens[3]
    assert len(set(tokens[:4])) == 4
    folder = make_model_folder(tmp_path / "eos", replace(TINY, eos_token_ids=(eos,)))
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:

            async def run(**fields: Any) -> tuple[list[int], FinishReason]:
                got = await client.generate(PROMPT, 3, replace(greedy, **fields))
                assert isinstance(got.end, Decoded)
                return got.tokens, got.end.reason

            assert await run() == (tokens[:4], FinishReason.STOP)
            assert await run(stop_token_ids=(stop,)) == (tokens[:3], FinishReason.STOP)
            ended = await run(stop_token_ids=(stop,), ignore_eos=True)
            assert ended == (tokens[:3], FinishReason.STOP), "it is asked for by name"
            late, reason = await run(stop_token_ids=(stop,), min_tokens=9)
    assert not {stop, eos} & set(late[:9])
    assert len(late) >= 9
    assert (late[-1] in {stop, eos}) == (reason is FinishReason.STOP)


@pytest.mark.parametrize("level", [1, 3])
async def test_logprobs_are_those_of_a_reference_forward(folder: Path, level: int) -> None:
    sampling = replace(PENALISED, max_tokens=10, logprobs=6)
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            stream = await client.open(client.request(PROMPT, level, sampling))
            found: list[tuple[int, Logprobs | None]] = []
            while (event := await stream.next()) is not None:
                if isinstance(event, DecodedToken):
                    found.append((event.token_id, event.logprobs))
    tokens = list(PROMPT)
    assert len(found) == 10
    for token_id, logprobs in found:
        logits_V = next_logits(whole_model(folder), tokens, level)[0]
        expected = torch.log_softmax(logits_V.double(), dim=0)
        assert logprobs is not None
        assert logprobs.chosen.token_id == token_id
        assert logprobs.chosen.logprob == pytest.approx(float(expected[token_id]), abs=1e-3)
        values = [entry.logprob for entry in logprobs.top]
        assert values == pytest.approx(expected.topk(6).values.tolist(), abs=1e-3)
        tokens.append(token_id)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("num_resumed_tokens", {"num_resumed_tokens": len(PROMPT)}),
    ("stop_token_ids", {"sampling": replace(GREEDY, stop_token_ids=(TINY.vocab_size,))}),
    ("logit_bias", {"sampling": replace(GREEDY, logit_bias=((TINY.vocab_size, 1.0),))}),
]


async def test_bad_rules_are_named(folder: Path) -> None:
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            for field, change in BAD:
                stream = await client.open(replace(client.request(PROMPT, 3), **change))
                with pytest.raises(InvalidArgument) as caught:
                    await stream.next()
                assert caught.value.field == field
            assert await text(client, GREEDY) == generate_alone(folder, PROMPT, [3] * 8)
