"""Requests over real gRPC, prefill and decode apart: the text of the whole model in one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from colm_serve.core import (
    Decoded,
    FinishReason,
    PrefillPeer,
    PrefillRequest,
    SamplingParams,
)
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.errors import (
    ColmError,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    UnknownRequest,
)
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.proto.colm.v1 import decode_pb2
from colm_serve.transport import kv_frames, serde
from colm_serve.transport.channel import connect
from tests.helpers import (
    GREEDY,
    TINY,
    decode_service,
    generate_alone,
    make_model_folder,
    make_prompt,
    prefill_service,
    with_tokens,
)
from tests.worker_clients import DecodeClient, DecodeStream, decode_client, eventually
from tests.worker_clients import prefill_client as open_prefill_client

SAMPLED = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=7)
LEVELS = (1, 2, 3)


@dataclass
class Cluster:
    """One prefill and one decode worker."""

    decode: DecodeClient
    decode_worker: DecodeWorker
    prefill_worker: PrefillWorker
    prefill_address: str

    @property
    def prefill(self) -> tuple[str, ...]:
        return (self.prefill_address,)


@asynccontextmanager
async def cluster(
    folder: Path, prefill: dict[str, Any] | None = None, **decode: Any
) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        p_service, p_worker = stack.enter_context(prefill_service(folder, **(prefill or {})))
        d_service, d_worker = stack.enter_context(decode_service(folder, **decode))
        client = await stack.enter_async_context(
            decode_client(d_service.address, d_worker.kv_identity)
        )
        yield Cluster(client, d_worker, p_worker, p_service.address)
        # Every request ended one way or another: nothing may be held for it any more.
        await eventually(client.is_idle, "all decode pages are free")


@dataclass
class Gate:
    """Holds a model before each of its blocks until opened."""

    is_open: threading.Event

    def __call__(self) -> None:
        assert self.is_open.wait(60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(threading.Event())
    yield gate
    gate.is_open.set()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 1000])
async def test_text_is_the_whole_models_cold_and_cached(
    folder: Path, num_tokens: int, sampling: SamplingParams
) -> None:
    for level in LEVELS:
        prompt = make_prompt(num_tokens, seed=100 * level + num_tokens)
        expected = generate_alone(folder, prompt, [level] * 8, sampling)
        async with cluster(folder) as c:
            cold = await c.decode.generate(prompt, level, sampling, c.prefill)
            cached = await c.decode.generate(prompt, level, sampling, c.prefill)
            status = await c.decode.status()
            assert status.prefill_tokens_per_s == 0, "nothing was to be computed here"
        num_blocks = (num_tokens - 1) // 16
        assert cold.tokens == cached.tokens == expected
        assert cold.levels == [level] * 8
        assert (cold.num_cached, cold.num_shipped) == (0, num_tokens - 1)
        assert (cached.num_cached, cached.num_shipped) == (
            16 * num_blocks,
            num_tokens - 1 - 16 * num_blocks,
        )
        assert cold.end is not None
        assert cold.end.reason is FinishReason.LENGTH
        assert cold.end.num_cached_tokens == 0


async def test_prefixes_are_shared_across_levels_and_turns(folder: Path) -> None:
    """One cache for every level, and it holds what was generated too."""
    prompt = make_prompt(60)
    sampling = with_tokens(GREEDY, 36)
    async with cluster(folder) as c:
        first = await c.decode.generate(prompt, 3, sampling, c.prefill)
        longer = prompt[:50] + make_prompt(30, seed=5)
        forked = await c.decode.generate(longer, 1, GREEDY, c.prefill)
        next_turn = (*prompt, *first.tokens, *make_prompt(9, seed=6))
        answered = await c.decode.generate(next_turn, 2, GREEDY, c.prefill)
    assert forked.num_cached == 48
    assert forked.tokens == generate_alone(folder, longer, [1] * 8)
    assert answered.num_cached == 80, "60 + 36 tokens fill 6 blocks, but the last was never run"
    assert answered.num_shipped == len(next_turn) - 1 - 80
    assert answered.tokens == generate_alone(folder, next_turn, [2] * 8)


@pytest.mark.parametrize("chunk_tokens", [5, 64])
async def test_mixed_levels_in_one_batch_give_each_its_own_text(
    folder: Path, gate: Gate, chunk_tokens: int
) -> None:
    lengths = (40, 7, 90, 1, 33, 64)
    cases = [(make_prompt(n, seed=n), 1 + i % 3) for i, n in enumerate(lengths)]
    samplings = [GREEDY, SAMPLED] * 3
    prefill = {"chunk_tokens": chunk_tokens}
    async with cluster(folder, prefill, max_rows=4, before_block=gate) as c:
        calls = [
            asyncio.ensure_future(
                c.decode.generate(prompt, level, with_tokens(sampling, 16), c.prefill)
            )
            for (prompt, level), sampling in zip(cases, samplings, strict=True)
        ]
        await eventually(lambda: sum(c.decode_worker.status().num_running) == 6, "all six run")
        gate.is_open.set()
        generations = await asyncio.gather(*calls)
        num_steps = c.decode_worker.num_steps
    for (prompt, level), sampling, got in zip(cases, samplings, generations, strict=True):
        assert got.tokens == generate_alone(folder, prompt, [level] * 16, sampling)
    assert num_steps < 6 * 16, "they were not batched"


@pytest.mark.parametrize("moves", [(1,), (2, 3), (1, 3, 2)])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_moving_the_level_mid_text_equals_a_reference_that_switches_there(
    folder: Path, moves: tuple[int, ...], sampling: SamplingParams
) -> None:
    prompt = make_prompt(30)
    sampling = with_tokens(sampling, 200)
    # With what it has to send bounded the worker would be far ahead; slow blocks keep it near.
    step = threading.Semaphore(0)
    async with cluster(folder, before_block=lambda: step.acquire(timeout=60)) as c:
        stream = await c.decode.open(c.decode.request(prompt, 3, sampling, c.prefill))
        for count, level in enumerate(moves, start=1):
            step.release(5)  # a step asks once
            await stream.tokens(5 * count)
            await stream.move_level(level)
            await eventually(partial(_runs_at, c.decode, level), "the move")
        step.release(100_000)
        got = await stream.rest()
    assert len(got.tokens) == 200
    changes = [b for a, b in zip(got.levels, got.levels[1:], strict=False) if a != b]
    assert (got.levels[0], *changes) == (3, *moves)
    assert got.tokens == generate_alone(folder, prompt, got.levels, sampling)


async def _runs_at(client: DecodeClient, level: int) -> bool:
    return (await client.status()).num_running[level - 1] == 1


BAD: list[tuple[str, Any, type[ColmError]]] = [
    ("level", {"level": 0}, InvalidArgument),
    ("level", {"level": 4}, InvalidArgument),
    ("prompt_token_ids", {"prompt": ()}, InvalidArgument),
    ("prompt_token_ids", {"prompt": (1, TINY.vocab_size)}, InvalidArgument),
    ("prompt_token_ids", {"prompt": (2**32 - 1,)}, InvalidArgument),
    ("max_tokens", {"prompt": (1,) * 2048}, InvalidArgument),
    ("max_tokens", {"sampling": with_tokens(GREEDY, 2**31 - 1)}, InvalidArgument),
    ("kv_identity", {"kv_identity": "other weights"}, Incompatible),
]


async def test_bad_requests_are_named_and_disturb_no_neighbour(folder: Path) -> None:
    prompt = make_prompt(30)
    step = threading.Semaphore(0)
    async with cluster(folder, before_block=lambda: step.acquire(timeout=60)) as c:
        neighbour = await c.decode.open(
            c.decode.request(prompt, 3, with_tokens(GREEDY, 60), c.prefill)
        )
        step.release(TINY.num_layers * 3)
        await neighbour.tokens(3)
        for field, change, kind in BAD:
            request = replace(c.decode.request(prompt, 1, GREEDY, c.prefill), **change)
            await _is_refused(c.decode, serde.decode_start_to_proto(request), kind, field)
        for name, value in (("temperature", 2.5), ("top_p", 0.0), ("top_k", -1), ("max_tokens", 0)):
            message = serde.decode_start_to_proto(c.decode.request(prompt))
            setattr(message.sampling, name, value)
            await _is_refused(c.decode, message, InvalidArgument, name)
        await _is_refused(c.decode, decode_pb2.DecodeStart(), InvalidArgument, "sampling")
        step.release(100_000)
        got = await neighbour.rest()
    assert got.tokens == generate_alone(folder, prompt, [3] * 60)


async def _is_refused(
    client: DecodeClient, message: decode_pb2.DecodeStart, kind: type[ColmError], field: str
) -> None:
    stream = DecodeStream(client.stub, message)
    with pytest.raises(kind, match=field) as caught:
        await stream.next()
    if isinstance(caught.value, InvalidArgument):
        assert field in caught.value.field


async def test_a_bad_move_is_refused_and_disturbs_no_stream(folder: Path, gate: Gate) -> None:
    prompt = make_prompt(30)
    async with cluster(folder, before_block=gate) as c:
        stream = await c.decode.open(
            c.decode.request(prompt, 2, with_tokens(GREEDY, 20), c.prefill)
        )
        assert await stream.next() is not None, "admitted"
        with pytest.raises(InvalidArgument, match="level: 4 is not allowed; allowed: 1 to 3"):
            await stream.move_level(4)
        gate.is_open.set()
        assert (await stream.rest()).tokens == generate_alone(folder, prompt, [2] * 20)


async def test_a_request_that_has_ended_is_not_found(folder: Path) -> None:
    async with cluster(folder) as c:
        stream = await c.decode.open(c.decode.request(make_prompt(20), 2, GREEDY, c.prefill))
        await stream.rest()
        with pytest.raises(UnknownRequest):
            await stream.move_level(1)


async def test_a_request_whose_reader_has_not_seen_its_end_is_not_found(folder: Path) -> None:
    async with cluster(folder) as c:
        stream = await c.decode.open(c.decode.request(make_prompt(20), 2, GREEDY, c.prefill))
        assert await stream.next() is not None, "admitted"
        await eventually(c.decode.is_idle, "its last token")
        with pytest.raises(UnknownRequest):
            await stream.move_level(1)
        assert len((await stream.rest()).tokens) == 8


async def test_without_pages_a_request_is_refused_at_once_and_taken_later(
    folder: Path, gate: Gate
) -> None:
    prompt = make_prompt(100)
    async with cluster(folder, before_block=gate, kv_tokens=128) as c:
        first = await c.decode.open(c.decode.request(prompt, 1, GREEDY, c.prefill))
        assert await first.next() is not None, "admitted"
        with pytest.raises(ResourceExhausted, match="KV pages wanted") as caught:
            await c.decode.generate(make_prompt(100, seed=9), 1, GREEDY, c.prefill)
        assert caught.value.retry_after_s > 0
        gate.is_open.set()
        await first.rest()
        other = make_prompt(100, seed=9)
        got = await c.decode.generate(other, 1, GREEDY, c.prefill)
        assert got.tokens == generate_alone(folder, other, [1] * 8)


async def test_status_tells_waiting_and_running_by_level(folder: Path, gate: Gate) -> None:
    prompt = make_prompt(20)
    async with cluster(folder, before_block=gate) as c:
        streams = []
        for level in (1, 3, 3):
            streams.append(await c.decode.open(c.decode.request(prompt, level, GREEDY, c.prefill)))
        await eventually(lambda: _counts(c.decode, (1, 0, 2)), "they run")
        status = await c.decode.status()
        assert (status.num_levels, status.page_size, status.num_pages) == (3, 16, 512)
        assert status.num_free_pages <= status.num_pages - 4
        assert status.kv_identity == c.decode_worker.kv_identity
        gate.is_open.set()
        await asyncio.gather(*(stream.rest() for stream in streams))


async def _counts(client: DecodeClient, expected: tuple[int, ...]) -> bool:
    return (await client.status()).num_running == expected


@pytest.mark.parametrize("addresses", [(), ("127.0.0.1:1",)], ids=["none", "dead"])
async def test_without_a_prefill_worker_the_prompt_is_computed_here(
    folder: Path, addresses: tuple[str, ...]
) -> None:
    prompts = [make_prompt(n, seed=n) for n in (300, 40)]
    async with cluster(folder, max_batch_tokens=64) as c:
        got = await asyncio.gather(
            *(c.decode.generate(prompt, 2, GREEDY, addresses) for prompt in prompts)
        )
        status = await c.decode.status()
    for prompt, generation in zip(prompts, got, strict=True):
        assert generation.num_shipped == 0
        assert generation.tokens == generate_alone(folder, prompt, [2] * 8)
    assert status.prefill_tokens_per_s > 0


async def test_a_short_rest_is_computed_here_although_there_is_a_prefill_worker(
    folder: Path,
) -> None:
    async with cluster(folder, local_prefill_tokens=32) as c:
        short = await c.decode.generate(make_prompt(33), 2, GREEDY, c.prefill)
        long = await c.decode.generate(make_prompt(34, seed=3), 2, GREEDY, c.prefill)
        assert c.prefill_worker.num_computed_tokens == 33
    assert (short.num_shipped, long.num_shipped) == (0, 33)


async def test_a_prefill_worker_hears_when_the_first_token_is_due(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(folder) as c:
        heard = []
        submit = c.prefill_worker.submit

        def submit_and_tell(request: PrefillRequest, *others: Any) -> PrefillJob:
            heard.append(request.ttft_s)
            return submit(request, *others)

        monkeypatch.setattr(c.prefill_worker, "submit", submit_and_tell)
        for ttft_s in (None, 60.0):
            request = c.decode.request(make_prompt(50, seed=len(heard)), 1, GREEDY, c.prefill)
            await (await c.decode.open(replace(request, ttft_s=ttft_s))).rest()
    assert heard[0] is None
    assert heard[1] is not None
    assert 50 < heard[1] < 60, "what is left of it"


async def test_a_dead_prefill_worker_costs_only_the_way_to_the_spare(folder: Path) -> None:
    prompt = make_prompt(50)
    async with cluster(folder) as c:
        got = await c.decode.generate(prompt, 3, GREEDY, ("127.0.0.1:1", *c.prefill))
    assert got.num_shipped == 49
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_kv_of_other_weights_is_never_used(folder: Path, tmp_path: Path) -> None:
    """The prefill worker refuses by name; the request goes on with this worker's own chain 1."""
    prompt = make_prompt(50)
    foreign = make_model_folder(tmp_path / "other", seed=1)
    async with cluster(folder) as c:
        with prefill_service(foreign, epoch=2) as (service, worker):
            got = await c.decode.generate(prompt, 3, GREEDY, (service.address,))
            ours, layout = c.decode_worker.kv_identity, c.decode_worker.layout
            async with open_prefill_client(service.address, ours, layout) as direct:
                with pytest.raises(Incompatible, match="kv_identity"):
                    await direct.messages(direct.request(prompt))
            assert worker.num_computed_tokens == 0
    assert got.num_shipped == 0
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


@pytest.mark.parametrize("has_spare", [True, False], ids=["to a spare", "to local prefill"])
async def test_a_worker_that_replaced_the_one_meant_is_not_used(
    folder: Path, has_spare: bool
) -> None:
    prompt = make_prompt(50)
    async with cluster(folder) as c:
        replaced = PrefillPeer(c.prefill_address, epoch=99)
        spare = PrefillPeer(c.prefill_address, epoch=c.prefill_worker.epoch)
        peers = (replaced, spare) if has_spare else (replaced,)
        request = replace(c.decode.request(prompt, 3), prefill_peers=peers)
        got = await (await c.decode.open(request)).rest()
    assert got.num_shipped == (49 if has_spare else 0)
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_a_damaged_kv_stream_is_dropped_and_the_text_stays_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before the damage is kept; the rest is computed here."""
    prompt = make_prompt(200)
    honest = kv_frames.encode
    num_damaged = []

    def damage(frame: kv_frames.Frame, stream_id: int, parts: Any = ()) -> bytes:
        message = honest(frame, stream_id, parts)
        if frame.sequence != 6:
            return message
        num_damaged.append(1)
        return message[:-20] + bytes([message[-20] ^ 1]) + message[-19:]

    monkeypatch.setattr(kv_frames, "encode", damage)
    async with cluster(folder, prefill={"chunk_tokens": 64}) as c:
        got = await c.decode.generate(prompt, 3, GREEDY, c.prefill)
    assert num_damaged
    assert got.num_shipped == 64, "the first chunk's three layers were whole"
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_a_prefill_worker_that_sends_nothing_is_left_at_the_frame_timeout(
    folder: Path, gate: Gate
) -> None:
    prompt = make_prompt(50)
    async with cluster(folder, prefill={"before_block": gate}, frame_timeout_s=0.2) as c:
        got = await c.decode.generate(prompt, 3, GREEDY, c.prefill)
        assert got.num_shipped == 0
        gate.is_open.set()
        async with open_prefill_client(
            c.prefill_address, c.decode.kv_identity, c.decode_worker.layout
        ) as prefill:
            await eventually(prefill.is_idle, "its pages come back")
    assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_eos_ends_a_text_unless_ignored(tmp_path: Path) -> None:
    prompt = make_prompt(20)
    plain = make_model_folder(tmp_path / "plain")
    text = generate_alone(plain, prompt, [3] * 8)
    with_eos = make_model_folder(tmp_path / "eos", replace(TINY, eos_token_ids=(text[2],)))
    num_until_eos = text.index(text[2]) + 1
    async with cluster(with_eos) as c:
        ended = await c.decode.generate(prompt, 3, GREEDY, c.prefill)
        ignored = await c.decode.generate(prompt, 3, replace(GREEDY, ignore_eos=True), c.prefill)
    assert ended.tokens == text[:num_until_eos]
    assert ignored.tokens == text
    assert [g.end.reason for g in (ended, ignored) if isinstance(g.end, Decoded)] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]


async def test_a_storm_of_cancels_leaves_nothing_behind(folder: Path) -> None:
    """Streams are dropped at whatever stage they happen to be in; one that stays is untouched."""
    prompt = make_prompt(200)
    async with cluster(folder, prefill={"chunk_tokens": 16}) as c:
        stays = asyncio.create_task(
            c.decode.generate(prompt, 3, with_tokens(GREEDY, 40), c.prefill)
        )
        for seed in range(24):
            request = c.decode.request(
                make_prompt(150, seed=seed), 1 + seed % 3, with_tokens(GREEDY, 40), c.prefill
            )
            stream = await c.decode.open(request)
            for _ in range(seed % 4):
                await stream.next()
            stream.cancel()
        assert (await stays).tokens == generate_alone(folder, prompt, [3] * 40)
        await eventually(c.decode.is_idle, "all pages are free")
        async with open_prefill_client(
            c.prefill_address, c.decode.kv_identity, c.decode_worker.layout
        ) as prefill:
            await eventually(prefill.is_idle, "the prefill worker has stopped")


async def test_a_worker_that_stops_ends_its_streams_and_frees_their_pages(folder: Path) -> None:
    """`decode_service` checks the pages once the worker has stopped."""
    with decode_service(folder, grace_s=0.0) as (service, worker):
        channel = connect(service.address, None)
        client = DecodeClient(channel, worker.kv_identity)
        stream = await client.open(client.request(make_prompt(30), 3, with_tokens(GREEDY, 2000)))
        await stream.tokens(2)
    with pytest.raises(Unavailable):
        await stream.rest()
    with pytest.raises(Unavailable):
        await client.generate(make_prompt(30))
    await channel.close()


async def test_a_request_that_takes_too_long_is_ended(folder: Path, gate: Gate) -> None:
    async with cluster(folder, before_block=gate, max_request_s=0.3) as c:
        with pytest.raises(DeadlineExceeded, match=r"max_request_s: 0\.3"):
            await c.decode.generate(make_prompt(30), 3, GREEDY, c.prefill)
        gate.is_open.set()
