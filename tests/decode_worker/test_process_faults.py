"""Workers in processes of their own: killed mid-prefill, and clients that leave at every stage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from colm_serve.core import Admitted
from colm_serve.engine.loading import kv_layout
from tests.engine.paged import open_chain_1
from tests.helpers import GREEDY, generate_alone, make_prompt, with_tokens
from tests.worker_clients import (
    DecodeClient,
    DecodeStream,
    PrefillClient,
    decode_client,
    eventually,
    prefill_client,
)
from tests.worker_process import WorkerProcess, starting

# Two blocks are slept before in each chunk, so a prefill of 400 tokens takes above half a second
# at a victim, one of 1600 tokens six seconds at the spare; 400 tokens' decode takes six as well.
CHUNK_TOKENS = 16
VICTIM_DELAY_S = 0.01
SPARE_DELAY_S = 0.03
DECODE_DELAY_S = 0.005
LEVEL = 3
LONG = with_tokens(GREEDY, 400)


@dataclass(frozen=True)
class Fleet:
    """One decode worker, a slow prefill worker that stays, and two more to be killed."""

    decode: WorkerProcess
    spare: WorkerProcess
    victims: list[WorkerProcess]


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    config = {"chunk_tokens": CHUNK_TOKENS}
    with ExitStack() as stack:
        decode = stack.enter_context(
            starting("decode", folder, DECODE_DELAY_S, max_batch_tokens=2 * CHUNK_TOKENS + 1)
        )
        spare, *victims = [
            stack.enter_context(starting("prefill", folder, delay_s, **config))
            for delay_s in (SPARE_DELAY_S, VICTIM_DELAY_S, VICTIM_DELAY_S)
        ]
        yield Fleet(decode.wait(), spare.wait(), [victim.wait() for victim in victims])
        # They check their pages when they end; see `helpers.decode_service`.
        assert [decode.end(), spare.end()] == [0, 0]


def open_prefill(
    process: WorkerProcess, folder: Path
) -> AbstractAsyncContextManager[PrefillClient]:
    layout = kv_layout(open_chain_1(folder))
    return prefill_client(process.address, process.kv_identity, layout)


async def is_mid_prefill(prefill: PrefillClient, num_tokens: int) -> bool:
    """Some chunks of the prompt have been computed and sent, others not begun."""
    num_queued = (await prefill.status()).num_queued_tokens
    return 0 < num_queued <= num_tokens - 4 * CHUNK_TOKENS


@pytest.mark.parametrize("has_spare", [True, False], ids=["to a spare", "to local prefill"])
async def test_a_prefill_worker_killed_mid_prefill_changes_no_token(
    fleet: Fleet, folder: Path, has_spare: bool
) -> None:
    victim = fleet.victims[int(has_spare)]
    prompt = make_prompt(400, seed=40 + has_spare)
    addresses = (victim.address, fleet.spare.address) if has_spare else (victim.address,)
    async with (
        decode_client(fleet.decode.address, fleet.decode.kv_identity) as decode,
        open_prefill(victim, folder) as prefill,
    ):
        stream = await decode.open(decode.request(prompt, LEVEL, GREEDY, addresses))
        await eventually(lambda: is_mid_prefill(prefill, 400), "it is under way")
        victim.kill()
        got = await stream.rest()
        await eventually(decode.is_idle, "all decode pages are free")
    assert got.tokens == generate_alone(folder, prompt, [LEVEL] * 8)
    if has_spare:
        assert got.num_shipped == 399
    else:
        # What the dead worker had delivered was kept, the rest computed here.
        assert CHUNK_TOKENS <= got.num_shipped < 399


async def leave_at_once(decode: DecodeClient, stream: DecodeStream, prefill: PrefillClient) -> None:
    """Before the worker has had a chance to admit."""


async def leave_while_kv_arrives(
    decode: DecodeClient, stream: DecodeStream, prefill: PrefillClient
) -> None:
    assert isinstance(await stream.next(), Admitted)
    await eventually(lambda: is_mid_prefill(prefill, 1600), "the prefill is under way")
    assert (await decode.status()).num_waiting == 1


async def leave_in_local_prefill(
    decode: DecodeClient, stream: DecodeStream, prefill: PrefillClient
) -> None:
    assert isinstance(await stream.next(), Admitted)
    assert (await decode.status()).num_waiting == 1


async def leave_in_decode(
    decode: DecodeClient, stream: DecodeStream, prefill: PrefillClient
) -> None:
    await stream.tokens(3)
    assert (await decode.status()).num_running[LEVEL - 1] == 1


@pytest.mark.parametrize(
    ("stage", "num_tokens", "is_local"),
    [
        (leave_at_once, 1600, False),
        (leave_while_kv_arrives, 1600, False),
        (leave_in_local_prefill, 1600, True),
        (leave_in_decode, 40, False),
    ],
)
async def test_a_client_that_leaves_at_any_stage_leaves_nothing(
    fleet: Fleet,
    folder: Path,
    stage: Callable[[DecodeClient, DecodeStream, PrefillClient], Awaitable[None]],
    num_tokens: int,
    is_local: bool,
) -> None:
    prompt = make_prompt(num_tokens, seed=len(stage.__name__))
    async with (
        decode_client(fleet.decode.address, fleet.decode.kv_identity) as decode,
        open_prefill(fleet.spare, folder) as prefill,
    ):
        addresses = () if is_local else (fleet.spare.address,)
        stream = await decode.open(decode.request(prompt, LEVEL, LONG, addresses))
        await stage(decode, stream, prefill)
        stream.cancel()
        # Half of what the rest of the request would have taken.
        await eventually(prefill.is_idle, "the prefill worker has stopped", timeout_s=3)
        await eventually(decode.is_idle, "all decode pages are free", timeout_s=3)
        got = await decode.generate(make_prompt(20), LEVEL, GREEDY, (fleet.spare.address,))
    assert got.tokens == generate_alone(folder, make_prompt(20), [LEVEL] * 8)
