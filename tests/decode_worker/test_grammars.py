"""Constrained output over real gRPC: in a batch with others, resumed elsewhere, and refused."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from colm_serve.core import Decoded, FinishReason, SamplingParams, StepCost
from colm_serve.decode_worker import worker as worker_module
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
)
from tests.router.cluster import save_tokenizer, trained_tokenizer
from tests.router.scripted import END_OF_TEXT, VOCAB_SIZE
from tests.worker_clients import decode_client

MODEL = replace(TINY, vocab_size=VOCAB_SIZE + 11, eos_token_ids=(END_OF_TEXT,))
PROMPT = make_prompt(20, MODEL)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0},
                  "maxItems": 3},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "sizes", "kind"],
}  # fmt: skip
OBJECT = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
CALL = Grammar(GrammarKind.REGEX, r"[a-z]{3,12}\(\d{1,3}(, \d{1,3}){0,4}\)")
SAMPLED = SamplingParams(max_tokens=250, temperature=1.0, seed=3)
NEIGHBOUR = replace(SAMPLED, max_tokens=40, seed=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "with_tokenizer", MODEL)
    save_tokenizer(folder)
    return folder


def text_of(tokens: list[int]) -> str:
    return str(trained_tokenizer().decode(tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_mixed_batch_of_grammars(folder: Path, temperature: float) -> None:
    asked = replace(SAMPLED, temperature=temperature)
    samplings = [
        replace(asked, grammar=OBJECT),
        NEIGHBOUR,
        replace(asked, grammar=CALL, presence_penalty=2.0, min_tokens=9, ignore_eos=True),
        replace(asked, grammar=Grammar.of_choices(["yes", "no"]), logprobs=2),
    ]
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            for level in (1, 2, 3):
                asking = (client.generate(PROMPT, level, each) for each in samplings)
                object_, neighbour, call, choice = await asyncio.gather(*asking)
                alone = generate_alone(folder, PROMPT, [level] * 40, NEIGHBOUR)
                end = alone.index(END_OF_TEXT) + 1 if END_OF_TEXT in alone else 40
                assert neighbour.tokens == alone[:end]
                for constrained in (object_, call, choice):
                    assert isinstance(constrained.end, Decoded)
                    assert constrained.end.reason is FinishReason.STOP
                    assert constrained.tokens[-1] == END_OF_TEXT
                value = json.loads(text_of(object_.tokens))
                assert set(value) == set(SCHEMA["properties"])
                assert re.fullmatch(CALL.text, text_of(call.tokens))
                assert text_of(choice.tokens) in ("yes", "no")


async def test_a_text_left_in_the_middle_goes_on_elsewhere_as_it_would_have(folder: Path) -> None:
    asked = replace(SAMPLED, grammar=OBJECT, frequency_penalty=0.5)
    with (
        decode_service(folder) as (first, worker),
        decode_service(folder, 2) as (second, _),
    ):
        async with decode_client(first.address, worker.kv_identity) as client:
            whole = (await client.generate(PROMPT, 3, asked)).tokens
        async with decode_client(second.address, worker.kv_identity) as client:
            for num_before in (1, len(whole) // 2, len(whole) - 1):
                prompt = (*PROMPT, *whole[:num_before])
                request = client.request(prompt, 3, replace(asked, max_tokens=250 - num_before))
                stream = await client.open(replace(request, num_resumed_tokens=num_before))
                assert (await stream.rest()).tokens == whole[num_before:]


async def test_grammars_that_fail_leave_the_batch_as_it_is(folder: Path) -> None:
    impossible = [
        Grammar(GrammarKind.REGEX, "("),
        Grammar(GrammarKind.REGEX, r"[^\s\S]"),
        Grammar(GrammarKind.REGEX, r"aa[^\s\S]"),  # found when it is there
        Grammar(GrammarKind.EBNF, 'root ::= root "a"', "what the client called it"),
        Grammar(GrammarKind.JSON_SCHEMA, '{"not": {}}'),
    ]
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            running = asyncio.create_task(client.generate(PROMPT, 3, NEIGHBOUR))
            for grammar in impossible:
                with pytest.raises(InvalidArgument) as caught:
                    await client.generate(PROMPT, 3, replace(SAMPLED, grammar=grammar))
                assert caught.value.field.startswith(grammar.field)
            tokens = (await running).tokens
            assert tokens == generate_alone(folder, PROMPT, [3] * len(tokens), NEIGHBOUR)
            assert (await client.generate(PROMPT, 3, NEIGHBOUR)).tokens == tokens
            worker.check_alive()


async def test_a_model_without_a_tokenizer_serves_all_else(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "bare")
    prompt = make_prompt(20)
    with decode_service(folder) as (service, worker):
        async with decode_client(service.address, worker.kv_identity) as client:
            with pytest.raises(InvalidArgument, match="no tokenizer"):
                await client.generate(prompt, 3, replace(GREEDY, grammar=CALL))
            assert (await client.generate(prompt, 3, GREEDY)).tokens == (
                generate_alone(folder, prompt, [3] * 8)
            )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_drafts_change_no_constrained_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    asked = replace(SAMPLED, temperature=temperature, frequency_penalty=0.3)
    samplings = [replace(asked, grammar=grammar) for grammar in (OBJECT, CALL)]
    texts, num_accepted = [], []
    # Drafts that cost next to nothing are made, those that cost a step are not.
    for draft_s, rest_s in ((0.001, 1.0), (1.0, 0.001)):
        cost = StepCost((draft_s, rest_s, rest_s), (0.1, 0.0, 0.0))
        monkeypatch.setattr(worker_module, "measure_step_cost", lambda *_, cost=cost: cost)
        with decode_service(folder, speculation={"sampled": True}) as (service, worker):
            async with decode_client(service.address, worker.kv_identity) as client:
                asking = (client.generate(PROMPT, 3, each) for each in samplings)
                texts.append([got.tokens for got in await asyncio.gather(*asking)])
                num_accepted.append((await client.status()).num_accepted)
    assert texts[0] == texts[1]
    assert num_accepted[0] > num_accepted[1] == 0
