"""Every sampling field at and beyond its borders, all fields together, on a real worker."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from colm_serve.errors import InvalidArgument, RowFailed
from colm_serve.proto.colm.v1 import common_pb2, decode_pb2
from tests.helpers import GREEDY, TINY, decode_service, generate_alone, make_prompt, with_tokens
from tests.worker_clients import DecodeClient, DecodeStream, decode_client, eventually

NUM_ROUNDS, NUM_CASES = 40, 50
VOCAB_SIZE = TINY.vocab_size
NEIGHBOUR = with_tokens(GREEDY, 48)
MAX_INT32 = 2**31 - 1
BORDERS = {
    "temperature": (0.0, 2.0), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 2.0), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0), "logit_bias": (-100.0, 100.0),
}  # fmt: skip
FLOATS = sorted(BORDERS.keys() - {"logit_bias"})
#: Lists of token ids, and the most of them here.
LISTS = {"logit_bias": 80, "stop_token_ids": 64}
#: Within some fields' borders, beyond others'.
ODD_FLOATS = (
    0.0, -0.0, 1e-45, -1e-45, 1e-39, 1e-38, 1e-37, 1e-30, 1e-6, 1e-5, 1e-3, 0.5, 1.0, 1.5, 3e38,
    -3e38, math.inf, -math.inf, math.nan,
)  # fmt: skip
INTEGERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "max_tokens": ((1, 2, 3), (0, -1, MAX_INT32, -MAX_INT32)),
    "top_k": ((0, 1, 2, VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 1, MAX_INT32), (-1, -MAX_INT32)),
    "seed": ((0, 1, 2**63, 2**64 - 1), ()),
    "min_tokens": ((0, 1), (-1, 4, MAX_INT32)),
    "logprobs": ((0, 1, 20), (-1, 21, MAX_INT32)),
    "prompt_logprobs": ((0, 1, 20), (-1, 21, MAX_INT32)),
}


def near(border: float) -> list[float]:
    """A border and its neighbours among the float32."""
    at = np.float32(border)
    return [float(at), *(float(np.nextafter(at, np.float32(way))) for way in (-9e9, 9e9))]


def make_float(random: Random, name: str, is_beyond: bool) -> float:
    low, high = BORDERS[name]
    values = [*near(low), *near(high), random.uniform(low, high), *ODD_FLOATS]
    within = [value for value in values if np.float32(low) <= value <= np.float32(high)]
    return random.choice([v for v in values if v not in within] if is_beyond else within)


def make_sampling(random: Random) -> common_pb2.SamplingParams:
    """What may stand on the wire, whoever has put it there."""
    fields: dict[str, Any] = {"max_tokens": 3, "seed": 0, "ignore_eos": random.random() < 0.3}
    # At most one is beyond: were each now and then, the others would hide it.
    beyond = random.choice((*FLOATS, *INTEGERS, *LISTS)) if random.random() < 0.5 else None
    for name in FLOATS:
        if name == beyond or random.random() < 0.5:
            fields[name] = make_float(random, name, name == beyond)
    for name, (good, bad) in INTEGERS.items():
        if name == beyond or random.random() < 0.4:
            fields[name] = random.choice(bad if bad and name == beyond else good)
    for name, most in LISTS.items():
        if name == beyond or random.random() < 0.3:
            token_ids = random.sample(range(VOCAB_SIZE), random.choice((1, 3, most)))
            if name == beyond:
                token_ids[0] = random.choice((0, VOCAB_SIZE, 2**32 - 1))
            fields[name] = token_ids
    is_beyond = beyond == "logit_bias" and max(fields["logit_bias"]) < VOCAB_SIZE
    biased = fields.pop("logit_bias", ())
    fields["logit_bias"] = {i: make_float(random, "logit_bias", is_beyond) for i in biased}
    return common_pb2.SamplingParams(**fields)


@dataclass
class Tally:
    """How the cases ended."""

    num_texts: int = 0
    refused: list[str] = field(default_factory=list)

    async def run(self, client: DecodeClient, random: Random, prompt: tuple[int, ...]) -> None:
        sampling = make_sampling(random)
        start = decode_pb2.DecodeStart(
            request_id="odd", prompt_token_ids=prompt, level=random.randint(1, 3),
            sampling=sampling, kv_identity=client.kv_identity,
        )  # fmt: skip
        try:
            got = await DecodeStream(client.stub, start).rest()
        except InvalidArgument as error:
            self.refused.append(error.field.partition("[")[0])
        except RowFailed as error:
            raise AssertionError(f"within its borders, and yet it failed: {sampling}") from error
        else:
            self.num_texts += 1
            assert 1 <= len(got.tokens) <= sampling.max_tokens
            assert all(0 <= token < VOCAB_SIZE for token in got.tokens)


async def test_no_values_of_the_fields_hurt_the_worker_or_a_neighbour(folder: Path) -> None:
    random, tally = Random(20), Tally()
    prompts = [make_prompt(n, seed=n) for n in (1, 2, 9, 17, 40)]
    speculation = {"enabled": True, "sampled": True}
    with decode_service(folder, local_prefill_tokens=2048, speculation=speculation) as (s, worker):
        async with decode_client(s.address, worker.kv_identity) as client:
            expected = {
                (prompt, level): generate_alone(folder, prompt, [level] * 48, NEIGHBOUR)
                for prompt in prompts
                for level in (2, 3)
            }
            for round_ in range(NUM_ROUNDS):
                prompt, level = random.choice(prompts), random.choice((2, 3))
                neighbour = await client.open(client.request(prompt, level, NEIGHBOUR))
                await asyncio.gather(
                    neighbour.rest(),
                    *(tally.run(client, random, random.choice(prompts)) for _ in range(NUM_CASES)),
                )
                assert neighbour.got.tokens == expected[prompt, level], f"round {round_}"
                worker.check_alive()
            await eventually(client.is_idle, "all pages are free")
    assert worker.status().num_failed_rows == 0
    assert tally.num_texts + len(tally.refused) == NUM_ROUNDS * NUM_CASES
    assert tally.num_texts > 700
    assert set(tally.refused) == {*BORDERS, *INTEGERS, *LISTS} - {"seed"}
