"""The gRPC client, in both its forms, against a real router."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from colm_serve.client import AsyncClient, Client, Finished, GenerationEvent, Started, Token
from colm_serve.core import FinishReason, SamplingParams
from colm_serve.errors import DeadlineExceeded, InvalidArgument, Unavailable, UnknownModel
from tests.router.cluster import MODEL, scripted_cluster, trained_tokenizer
from tests.router.scripted import Script, continuation


def text_of(events: list[GenerationEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token | Finished))


async def test_both_clients_read_the_same_generation(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:

        def talk() -> list[GenerationEvent]:
            with Client(cluster.service.grpc_address) as client:
                return list(client.generate("def add", max_tokens=8, seed=3, level=2))

        blocking = await asyncio.to_thread(talk)
        stream = cluster.client.generate("def add", max_tokens=8, seed=3, level=2)
        events = [event async for event in stream]
        assert text_of(blocking) == text_of(events)
        prompt = trained_tokenizer().encode("def add").ids
        tokens = [event.token_id for event in blocking if isinstance(event, Token)]
        assert tokens == continuation(prompt, 8, 3, 2)
        assert isinstance(blocking[0], Started)
        assert isinstance(blocking[-1], Finished)
        assert blocking[-1].reason is FinishReason.LENGTH


async def test_every_option_arrives(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path) as cluster:
        stream = cluster.client.generate(
            messages=[{"role": "user", "content": "hi"}],
            model=MODEL,
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            seed=11,
            ignore_eos=True,
            min_p=0.125,
            repetition_penalty=1.25,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={7: 1.5, 5: -2},
            stop_token_ids=[299],
            min_tokens=2,
            logprobs=3,
            stop=["never"],
            min_level=1,
            max_level=2,
            sla_class="default",
            ttft_ms=2000.0,
            tpot_ms=12.0,
            deadline_s=4.0,
            timeout_s=5,
        )
        _ = [event async for event in stream]
        request = cluster.worker.requests[0]
        assert list(request.prompt) == trained_tokenizer().encode("<|user|>hi<|assistant|>").ids
        assert request.level == 1, "a step takes 10 ms a level"
        assert request.ttft_s == pytest.approx(2.0, abs=0.5)
        assert request.sampling == SamplingParams(
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            seed=11,
            ignore_eos=True,
            min_p=0.125,
            repetition_penalty=1.25,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias=((5, -2.0), (7, 1.5)),
            stop_token_ids=(299,),
            min_tokens=2,
            logprobs=3,
        )


async def test_set_level_and_status_of_the_blocking_client(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=1)) as cluster:

        def talk() -> list[int]:
            with Client(cluster.service.grpc_address) as client:
                assert client.status().workers[0].is_reachable
                levels = []
                for event in client.generate(token_ids=[5], max_tokens=4):
                    if isinstance(event, Started):
                        client.set_level(event.request_id, 1)
                    if isinstance(event, Token):
                        levels.append(event.level)
                return levels

        talking = asyncio.create_task(asyncio.to_thread(talk))
        while not cluster.worker.moves:
            await asyncio.sleep(0.01)
        cluster.worker.resume.set()
        assert (await talking)[1:] == [1, 1, 1]


async def test_leaving_the_blocking_generator_ends_the_generation(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=1)) as cluster:

        def talk() -> None:
            with (
                Client(cluster.service.grpc_address) as client,
                closing(client.generate(token_ids=[5])) as events,
            ):
                next(events)

        await asyncio.to_thread(talk)
        while not cluster.worker.num_cancelled:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "options", [{}, {"prompt": "x", "token_ids": [5]}, {"token_ids": [5], "messages": []}]
)
async def test_exactly_one_prompt(options: dict[str, object]) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument, match="one of prompt, token_ids and messages"):
            client.generate(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"seed": -1}, {"top_k": 2**40}, {"temperature": "hot"}])
async def test_what_does_not_fit_the_wire_is_refused_here(options: dict[str, object]) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument, match="fit the wire"):
        client.generate("x", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"top_p": 1e-50}, "top_p: 1e-50 is not allowed"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty: 1e-50 is not allowed"),
        ({"temperature": 1e300}, r"temperature: 1e\+300 is not allowed"),
        ({"logit_bias": {5: 1e300}}, r"logit_bias\[5\]: 1e\+300 is not allowed"),
    ],
)
async def test_what_the_wire_would_make_0_or_inf_is_refused_as_it_was_sent(
    options: dict[str, Any], shown: str
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument, match=shown):
        client.generate("x", **options)


async def test_errors_are_of_our_own_tree(tmp_path: Path) -> None:
    async with scripted_cluster(tmp_path, script=Script(hold_after=0)) as cluster:

        def talk() -> None:
            with Client(cluster.service.grpc_address) as client:
                with pytest.raises(UnknownModel, match="gpt-9"):
                    next(client.generate("x", model="gpt-9"))
                with pytest.raises(InvalidArgument) as error:
                    next(client.generate("x", level=9))
                assert error.value.field == "level"
                with pytest.raises(InvalidArgument):
                    client.set_level("nobody", 1)
                with pytest.raises(DeadlineExceeded):
                    list(client.generate("x", timeout_s=0.1))

        await asyncio.to_thread(talk)


async def test_no_router_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.status()
        with pytest.raises(Unavailable):
            await anext(client.generate("x"))
