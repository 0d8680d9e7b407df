"""Logprobs and several choices, as OpenAI's own client reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from colm_serve.core import MAX_SEED, Logprobs, SamplingParams, TokenLogprob
from colm_serve.errors import RowFailed
from colm_serve.router.openai.logprobs import completion_logprobs, token_text
from tests.router.cluster import MODEL, ScriptedCluster, scripted_cluster, trained_tokenizer
from tests.router.scripted import END_OF_TEXT, Script, continuation

PROMPT = [10, 11, 12]
CHAT: list[Any] = [{"role": "user", "content": "hi"}]
WORDS = tuple(trained_tokenizer().encode("def naïve 東京").ids)


def openai_client(cluster: ScriptedCluster) -> openai.AsyncOpenAI:
    base_url = f"http://{cluster.service.http_address}/v1"
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)


def text_of(tokens: Sequence[int]) -> str:
    return str(trained_tokenizer().decode(list(tokens)))


async def test_completion_logprobs(tmp_path: Path) -> None:
    script = Script(text=WORDS)
    async with scripted_cluster(tmp_path, script=script) as cluster, openai_client(cluster) as c:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": len(WORDS)}
        reply = await c.completions.create(**asked, logprobs=2)
        parts = [part async for part in await c.completions.create(
            **asked, logprobs=2, stream=True
        )]  # fmt: skip
        found = reply.choices[0].logprobs
        assert found is not None
        assert found.token_logprobs == [-0.5] * len(WORDS)
        assert found.tokens is not None
        whole = [token for token in found.tokens if not token.startswith("bytes:")]
        assert 0 < len(whole) < len(WORDS), "some tokens are parts of characters"
        text = reply.choices[0].text
        assert found.text_offset is not None
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert token.startswith("bytes:") or text[offset:].startswith(token)
        assert found.top_logprobs is not None
        for token, top in zip(found.tokens, found.top_logprobs, strict=True):
            assert len(top) == 2
            assert top[token] == max(top.values()) == -0.5
        streamed = [part.choices[0].logprobs for part in parts]
        assert streamed[-1] is None
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            each = [value for piece in streamed[:-1] for value in getattr(piece, field)]
            assert each == getattr(found, field)


async def test_zero_logprobs_are_those_of_the_chosen_tokens(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 2, "logprobs": 0}
        choice = (await cluster.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"] == [{}, {}]
        body.pop("logprobs")
        choice = (await cluster.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["logprobs"] is None
        assert cluster.worker.requests[-1].sampling.logprobs is None


async def test_chat_logprobs(tmp_path: Path) -> None:
    script = Script(text=WORDS)
    async with scripted_cluster(tmp_path, script=script) as cluster, openai_client(cluster) as c:
        asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": len(WORDS)}
        reply = await c.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        parts = [part async for part in await c.chat.completions.create(
            **asked, logprobs=True, top_logprobs=3, stream=True
        )]  # fmt: skip
        plain = await c.chat.completions.create(**asked, logprobs=True)
        found = reply.choices[0].logprobs
        assert found is not None
        assert found.content is not None
        data = b"".join(bytes(entry.bytes or []) for entry in found.content)
        assert data.decode("utf-8") == reply.choices[0].message.content
        for entry in found.content:
            assert entry.logprob == -0.5
            assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5, -2.5]
            assert entry.top_logprobs[0].token == entry.token
        streamed = [part.choices[0].logprobs for part in parts]
        assert (streamed[0], streamed[-1]) == (None, None), "the role and the reason"
        assert [e for piece in streamed[1:-1] if piece for e in piece.content or ()] == (
            found.content
        )
        assert plain.choices[0].logprobs is not None
        assert [e.top_logprobs for e in plain.choices[0].logprobs.content or ()] == [[]] * len(
            WORDS
        )


def test_tokens_without_bytes_show_their_ids() -> None:
    assert token_text(TokenLogprob(7, -1.0)) == "token_id:7"
    assert token_text(TokenLogprob(7, -1.0, b"\xe6\x9d")) == "bytes:\\xe6\\x9d"


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    same = (TokenLogprob(7, -1.0, b"a"), TokenLogprob(8, -2.0, b"a"))
    shown = completion_logprobs([Logprobs(same[0], same)], text_offset=5)
    assert shown["top_logprobs"] == [{"a": -1.0}]
    assert shown["text_offset"] == [5]


async def test_the_cache_salt_reaches_the_worker(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        for salt in ({}, {"cache_salt": "tenant"}):
            body = {"prompt": PROMPT, "max_tokens": 1, **salt}
            assert (await cluster.http.post("/v1/completions", json=body)).status_code == 200
        assert [r.cache_salt for r in cluster.worker.requests] == ["", "tenant"]


@pytest.mark.parametrize("seed", [4, MAX_SEED])
async def test_choices_have_seeds_of_their_own(tmp_path: Path, seed: int) -> None:
    script = Script(num_cached=2)
    async with scripted_cluster(tmp_path, script=script) as cluster, openai_client(cluster) as c:
        reply = await c.completions.create(
            model=MODEL, prompt=[PROMPT, [20, 21]], max_tokens=5, seed=seed, n=3
        )
        assert [choice.index for choice in reply.choices] == list(range(6))
        seeds = [seed, (seed + 1) % 2**64, (seed + 2) % 2**64]
        expected = [
            text_of(continuation(prompt, 5, each, 3)) for prompt in (PROMPT, [20, 21])
            for each in seeds
        ]  # fmt: skip
        assert [choice.text for choice in reply.choices] == expected
        assert reply.usage is not None
        # Each prompt once, each choice's output.
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 30)
        assert reply.usage.total_tokens == 35
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 4


async def test_streamed_choices_of_a_chat(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=4, seed=9, n=4, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        parts = [part async for part in stream]
        texts, ends = [""] * 4, [0] * 4
        for part in parts[:-1]:
            [choice] = part.choices
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason == "length"
        prompt = cluster.worker.requests[0].prompt
        assert texts == [text_of(continuation(prompt, 4, 9 + i, 3)) for i in range(4)]
        assert ends == [1] * 4
        assert parts[-1].usage is not None
        assert parts[-1].usage.completion_tokens == 16
        assert parts[-1].usage.prompt_tokens == len(prompt)
        assert len({part.id for part in parts}) == 1


async def test_without_a_seed_choices_differ(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 8, "n": 16}
        reply = (await cluster.http.post("/v1/completions", json=body)).json()
        assert len({choice["text"] for choice in reply["choices"]}) == 16


async def test_the_other_choices_wait_until_the_prompt_is_cached(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=0)) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 2, "n": 3}
        asking = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
        await cluster.worker.held.wait()
        await asyncio.sleep(0.05)
        assert len(cluster.worker.requests) == 1
        cluster.worker.resume.set()
        assert len((await asking).json()["choices"]) == 3
        assert len(cluster.worker.requests) == 3


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_when_the_first_choice_fails_none_begins(tmp_path: Path, is_streamed: bool) -> None:
    script = Script(fail_after=0, fail_with_error=RowFailed("no numbers"))
    async with scripted_cluster(tmp_path, script=script) as cluster:
        body = {"prompt": PROMPT, "n": 3, "stream": is_streamed}
        response = await cluster.http.post("/v1/completions", json=body)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert json.loads(lines[-1])["error"]["code"] == "generation_failed"
        assert len(cluster.worker.requests) == 1


async def test_every_sampling_field_reaches_the_worker(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster, openai_client(cluster) as client:
        await client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=3, seed=1, temperature=0.5, top_p=0.25,
            presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"7": 2, "5": -100},
            extra_body={
                "min_p": 0.125, "repetition_penalty": 1.25, "stop_token_ids": [299],
                "min_tokens": 2, "ignore_eos": True, "top_k": 3,
            },
        )  # fmt: skip
        assert cluster.worker.requests[0].sampling == SamplingParams(
            max_tokens=3, seed=1, temperature=0.5, top_p=0.25, top_k=3, ignore_eos=True,
            min_p=0.125, repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=-0.5,
            logit_bias=((5, -100.0), (7, 2.0)), stop_token_ids=(299,), min_tokens=2,
        )  # fmt: skip


async def test_a_stop_token_ends_a_choice(tmp_path: Path) -> None:
    script = Script(text=WORDS)
    async with scripted_cluster(tmp_path, script=script) as cluster:
        body = {"prompt": PROMPT, "max_tokens": 9, "stop_token_ids": [WORDS[1]]}
        choice = (await cluster.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"] == text_of(WORDS[:2])
        assert choice["finish_reason"] == "stop"
        assert WORDS[1] != END_OF_TEXT
