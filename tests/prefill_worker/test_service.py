"""A prefill worker over real gRPC: what it sends, refuses, and gives back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from colm_serve.core import PrefillRequest
from colm_serve.errors import (
    ColmError,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    ResourceExhausted,
)
from colm_serve.prefill_worker import frame_packer
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.transport import kv_frames
from colm_serve.transport.kv_frames import MESSAGE
from colm_serve.transport.status import RETRY_AFTER_KEY, from_rpc_error
from tests.engine.paged import kv_of_whole_model
from tests.helpers import TINY, make_model_folder, make_prompt, prefill_service
from tests.worker_clients import STREAM_ID, PrefillClient, eventually, prefill_client


@asynccontextmanager
async def serving(
    folder: Path, before_block: Callable[[], object] | None = None, **changes: Any
) -> AsyncIterator[tuple[PrefillClient, PrefillWorker]]:
    """A worker and a client of it."""
    with prefill_service(folder, before_block=before_block, **changes) as (service, worker):
        identity = worker.status().kv_identity
        async with prefill_client(service.address, identity, worker.layout) as client:
            yield client, worker


@pytest.mark.parametrize("chunk_tokens", [7, 128])
@pytest.mark.parametrize("ship_from", [0, 5, 29])
async def test_frames_hold_every_layers_kv_from_ship_from_on(
    folder: Path, chunk_tokens: int, ship_from: int
) -> None:
    prompt = make_prompt(30)
    async with serving(folder, chunk_tokens=chunk_tokens) as (client, worker):
        answer = await client.frames(client.request(prompt, ship_from))
        await eventually(client.is_idle, "pages come back once everything is sent")
        assert worker.num_computed_tokens == 30
    assert answer.end.compute_s > 0
    for layer in range(TINY.num_layers):
        spans = [(f.start, f.start + f.num_tokens) for f, _ in answer.kv if f.layer == layer]
        assert spans[0][0] == ship_from
        assert spans[-1][1] == 30
        assert all(left[1] == right[0] for left, right in pairwise(spans))
    pool = answer.in_a_pool(client.layout)
    for layer, (k, v) in kv_of_whole_model(folder, prompt, level=3).items():
        k_read, v_read = pool.read(layer, pool.table([0]), ship_from, 30)
        torch.testing.assert_close(k_read, k[ship_from:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v[ship_from:], rtol=1e-4, atol=1e-5)


async def test_the_opening_comes_before_any_compute(folder: Path) -> None:
    """Also to who waits for pages, and with what there is to do before."""
    gate = threading.Event()
    async with serving(folder, before_block=gate.wait, kv_tokens=32) as (client, _):
        calls, openings = [], []
        for num_tokens in (30, 20):
            calls.append(client.open(client.request(make_prompt(num_tokens))))
            openings.append(await read_frame(calls[-1], 0))
        assert not gate.is_set()
        gate.set()
        for call in calls:
            await read_all(call)
        await eventually(client.is_idle, "it is done with them")
        later = (await client.frames(client.request(make_prompt(20, seed=2)))).opening
    expected = kv_frames.OpenFrame(
        sequence=0,
        epoch=1,
        kv_identity=client.kv_identity,
        layout=client.layout,
        codec="raw",
        path="message",
        num_cached_tokens=0,
        num_queued_tokens=0,
        tokens_per_s=0.0,
    )
    assert openings == [expected, replace(expected, num_queued_tokens=30)]
    assert later.tokens_per_s > 0
    assert later == replace(expected, tokens_per_s=later.tokens_per_s)


async def test_who_waits_hears_that_the_worker_makes_progress(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For pages, or for a prefix that is computed but not asked for."""
    monkeypatch.setattr("colm_serve.prefill_worker.service.WAIT_INTERVAL_S", 0.0)
    gate = threading.Event()
    async with serving(folder, before_block=gate.wait, kv_tokens=64, chunk_tokens=16) as (
        client,
        _,
    ):
        first = asyncio.create_task(client.frames(client.request(make_prompt(64))))
        await eventually(lambda: _has(client, num_running=1, num_waiting=0), "it runs")
        other = client.request(make_prompt(64, seed=2), ship_from=40)
        second = asyncio.create_task(client.frames(other))
        await eventually(lambda: _has(client, num_running=1, num_waiting=1), "it waits")
        gate.set()
        assert (await first).num_waits == 0
        assert (await second).num_waits >= 2 + 2, "of 4 passes for the first, 2 for its prefix"


async def test_signs_of_progress_are_few(folder: Path) -> None:
    async with serving(folder, chunk_tokens=16) as (client, _):
        answer = await client.frames(client.request(make_prompt(1600), ship_from=1599))
    assert answer.num_waits < 50, "one for each of 100 passes"


async def test_layers_are_sent_while_later_ones_are_computed(folder: Path) -> None:
    """The first layer's frame is here although the second block is not let run."""
    gate = threading.Event()
    blocks_run = []

    def hold_second_block() -> None:
        blocks_run.append(1)
        if len(blocks_run) == 2:
            assert gate.wait(30)

    async with serving(folder, before_block=hold_second_block) as (client, _):
        call = client.open(client.request(make_prompt(20)))
        await read_frame(call, 0)
        frame = await read_frame(call, 1)
        assert isinstance(frame, kv_frames.KvFrame)
        assert (frame.layer, frame.num_tokens) == (0, 20)
        assert not gate.is_set()
        gate.set()
        assert await read_all(call) == TINY.num_layers, "the other layers' frames and the end"


@pytest.mark.parametrize("ship_from", [0, 20, 70])
async def test_a_cached_prefix_is_sent_but_not_computed_again(folder: Path, ship_from: int) -> None:
    """A prompt of 100 tokens finds 64 of another one's."""
    prompt = make_prompt(100)
    other = prompt[:70] + make_prompt(30, seed=2)
    async with serving(folder, chunk_tokens=24) as (client, _):
        await client.frames(client.request(other))
        answer = await client.frames(client.request(prompt, ship_from))
        status = await client.status()
    assert answer.opening.num_cached_tokens == 64
    assert (status.num_computed_tokens, status.num_cached_tokens) == (100 + 36, 64)
    pool = answer.in_a_pool(client.layout)
    for layer, (k, v) in kv_of_whole_model(folder, prompt, level=1).items():
        k_read, v_read = pool.read(layer, pool.table([0]), ship_from, 100)
        torch.testing.assert_close(k_read, k[ship_from:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v_read, v[ship_from:], rtol=1e-4, atol=1e-5)


async def test_cached_tokens_are_sent_before_any_compute(folder: Path) -> None:
    gate = threading.Event()
    gate.set()
    async with serving(folder, before_block=lambda: gate.wait(30)) as (client, worker):
        await client.frames(client.request(make_prompt(64)))
        gate.clear()
        call = client.open(client.request(make_prompt(64) + make_prompt(20, seed=2)))
        await read_frame(call, 0)
        for layer in range(TINY.num_layers):
            assert await read_frame(call, 1 + layer) == kv_frames.KvFrame(1 + layer, layer, 0, 64)
        again = await client.frames(client.request(make_prompt(64)))
        assert len(again.kv) == TINY.num_layers, "no token of it is to be computed"
        assert worker.num_computed_tokens == 64
        gate.set()
        await read_all(call)


async def test_tenants_of_different_salts_share_nothing(folder: Path) -> None:
    async with serving(folder) as (client, worker):
        for salt in ("", "a", "b"):
            request = replace(client.request(make_prompt(32)), cache_salt=salt)
            answer = await client.frames(request)
            assert answer.opening.num_cached_tokens == 0
        assert worker.num_computed_tokens == 3 * 32


@pytest.mark.parametrize(
    ("ttft_s", "timeout_s", "expected_s"),
    [(None, None, None), (5, None, 5), (None, 20, 20), (5, 20, 5), (30, 20, 20)],
)
async def test_a_prompt_is_due_with_its_first_token_or_the_calls_end(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ttft_s: float | None,
    timeout_s: float | None,
    expected_s: float | None,
) -> None:
    async with serving(folder) as (client, worker):
        jobs = []
        submit = worker.submit

        def submit_and_tell(*arguments: Any) -> PrefillJob:
            jobs.append(submit(*arguments))
            return jobs[-1]

        monkeypatch.setattr(worker, "submit", submit_and_tell)
        begin = time.perf_counter()
        request = replace(client.request(make_prompt(20)), ttft_s=ttft_s)
        await read_all(client.open(request, timeout_s))
    (job,) = jobs
    assert job.num_sent == 20, "the scheduler hears what the receiver has"
    if expected_s is None:
        assert job.deadline is None
    else:
        assert job.deadline == pytest.approx(begin + expected_s, abs=3)


async def test_a_receiver_that_takes_nothing_leaves_the_time_to_others(tmp_path: Path) -> None:
    """Its KV is larger than every buffer on the way; it is computed 4 passes ahead, not more."""
    wide = replace(TINY, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=32, max_context=8192)
    folder = make_model_folder(tmp_path / "wide", wide)
    blocks = threading.Semaphore(0)
    async with serving(
        folder,
        before_block=lambda: blocks.acquire(timeout=60),
        kv_tokens=16384,
        chunk_tokens=512,
    ) as (client, worker):
        stalled = client.open(client.request(make_prompt(8000, wide)))
        await read_frame(stalled, 0)
        blocks.release(8 * (wide.num_layers - 1))
        await eventually(lambda: worker.num_computed_tokens == 8 * 512, "it is alone")
        async with prefill_client(client.address, client.kv_identity, client.layout) as other:
            taking = asyncio.create_task(other.frames(other.request(make_prompt(1536, wide, 2))))
            await eventually(lambda: _has(client, num_running=2, num_waiting=0), "it has pages")
            # The pass that was begun before, and the three that the other one needs alone.
            blocks.release(4 * (wide.num_layers - 1))
            await taking
        blocks.release(1000)
        assert await read_all(stalled) > 0


async def test_the_last_layer_stops_after_keys_and_values(folder: Path) -> None:
    num_blocks = []
    async with serving(folder, before_block=lambda: num_blocks.append(1)) as (client, _):
        answer = await client.frames(client.request(make_prompt(10)))
    assert {frame.layer for frame, _ in answer.kv} == set(range(TINY.num_layers))
    assert len(num_blocks) == TINY.num_layers - 1, "the last block's attention was computed"


async def test_large_layers_are_sent_in_several_frames(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folder) as (client, worker):
        per_frame = 8 * worker.pool.num_bytes_per_token
        monkeypatch.setitem(frame_packer.FRAME_BYTES, MESSAGE, per_frame)
        answer = await client.frames(client.request(make_prompt(20)))
    assert [frame.num_tokens for frame, _ in answer.kv] == [8, 8, 4] * TINY.num_layers


REFUSALS: list[tuple[str, Callable[[PrefillRequest], PrefillRequest], type[ColmError]]] = [
    ("kv_identity", lambda r: replace(r, kv_identity="other weights"), Incompatible),
    ("layout", lambda r: replace(r, layout=replace(r.layout, dtype="float16")), Incompatible),
    ("layout", lambda r: replace(r, layout=replace(r.layout, num_layers=9)), Incompatible),
    ("token_ids", lambda r: replace(r, tokens=()), InvalidArgument),
    ("token_ids", lambda r: replace(r, tokens=(TINY.vocab_size,)), InvalidArgument),
    ("token_ids", lambda r: replace(r, tokens=(2**32 - 1,)), InvalidArgument),
    ("token_ids", lambda r: replace(r, tokens=(0,) * (TINY.max_context + 1)), InvalidArgument),
    ("codec", lambda r: replace(r, codec="zip"), InvalidArgument),
    ("ship_from", lambda r: replace(r, ship_from=20), InvalidArgument),
    ("ship_from", lambda r: replace(r, ship_from=2**32 - 1), InvalidArgument),
]


async def test_what_can_not_work_is_refused_before_any_compute(folder: Path) -> None:
    async with serving(folder) as (client, worker):
        for named, change, kind in REFUSALS:
            with pytest.raises(kind, match=named) as caught:
                await client.messages(change(client.request(make_prompt(20))))
            if isinstance(caught.value, InvalidArgument):
                assert caught.value.field == named
        assert worker.num_computed_tokens == 0
        assert await client.is_idle()
        await client.frames(client.request(make_prompt(20)))


async def test_a_worker_with_other_weights_refuses_ours(folder: Path, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=1)
    async with serving(other) as (client, worker):
        with prefill_service(folder) as (_, ours):
            client.kv_identity = ours.status().kv_identity
        call = client.open(client.request(make_prompt(20)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert worker.num_computed_tokens == 0


async def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    gate = threading.Event()
    async with serving(folder, before_block=lambda: gate.wait(30), kv_tokens=32, max_queued=1) as (
        client,
        _,
    ):
        request = client.request(make_prompt(32))
        running = asyncio.create_task(client.frames(request))
        waiting = asyncio.create_task(client.frames(request))
        await eventually(lambda: _has(client, num_running=1, num_waiting=1), "both are queued")
        refused = client.open(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())[RETRY_AFTER_KEY]) > 0
        assert isinstance(from_rpc_error(caught.value), ResourceExhausted)
        gate.set()
        await asyncio.gather(running, waiting)


async def _has(client: PrefillClient, num_running: int, num_waiting: int) -> bool:
    status = await client.status()
    return (status.num_running, status.num_waiting) == (num_running, num_waiting)


async def test_concurrent_prompts_get_each_their_own_kv(folder: Path) -> None:
    prompts = [make_prompt(n, seed=n) for n in (90, 3, 41, 64)]
    async with serving(folder, chunk_tokens=32) as (client, _):
        results = await asyncio.gather(*(client.frames(client.request(p)) for p in prompts))
    for prompt, answer in zip(prompts, results, strict=True):
        pool = answer.in_a_pool(client.layout)
        for layer, (k, _v) in kv_of_whole_model(folder, prompt, level=1).items():
            k_read, _ = pool.read(layer, pool.table([0]), 0, len(prompt))
            torch.testing.assert_close(k_read, k, rtol=1e-4, atol=1e-5)


async def test_cancelling_mid_prompt_stops_the_compute_and_frees_the_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Semaphore(0)
    async with serving(folder, before_block=lambda: gate.acquire(timeout=30), chunk_tokens=16) as (
        client,
        worker,
    ):
        heard = threading.Event()
        finish = worker.finish

        def finish_and_tell(job: PrefillJob) -> None:
            finish(job)
            heard.set()

        monkeypatch.setattr(worker, "finish", finish_and_tell)
        call = client.open(client.request(make_prompt(1600)))
        # Enough for the first of a hundred chunks; the second is held before its first block.
        gate.release(TINY.num_layers - 1)
        for _ in range(2):
            assert isinstance(await call.read(), bytes)
        call.cancel()
        await eventually(heard.is_set, "the worker hears of the cancel")
        gate.release(1000)
        await eventually(client.is_idle, "pages come back")
        num_computed = worker.num_computed_tokens
        assert num_computed <= 16, "it went on computing"
        # Another prompt in between would have shown further chunks of the first.
        await client.frames(client.request(make_prompt(16, seed=2)))
        assert worker.num_computed_tokens == num_computed + 16


async def test_a_stalled_receiver_blocks_nobody_and_is_cut(tmp_path: Path) -> None:
    """Its KV is larger than every buffer on the way, and it reads none of it."""
    wide = replace(TINY, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=32)
    folder = make_model_folder(tmp_path / "wide", wide)
    async with serving(folder, kv_tokens=8192, chunk_tokens=512, stall_timeout_s=2.5) as (
        client,
        _,
    ):
        stalled = client.open(client.request(make_prompt(2048, wide)))
        async with prefill_client(client.address, client.kv_identity, client.layout) as other:
            answer = await other.frames(other.request(make_prompt(40, wide)))
            assert answer.kv
            assert not await other.is_idle(), "the stalled request is to be there still"
            await eventually(other.is_idle, "the stalled request's pages come back")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(stalled)
        assert isinstance(from_rpc_error(caught.value), DeadlineExceeded)


async def test_a_request_that_takes_too_long_is_ended(folder: Path) -> None:
    gate = threading.Event()
    async with serving(folder, before_block=lambda: gate.wait(30), max_request_s=0.3) as (
        client,
        _,
    ):
        with pytest.raises(DeadlineExceeded, match=r"max_request_s: 0\.3"):
            await client.messages(client.request(make_prompt(30)))
        gate.set()
        await eventually(client.is_idle, "its pages come back")


async def read_frame(call: grpc.aio.UnaryStreamCall[Any, bytes], sequence: int) -> kv_frames.Frame:
    message = await call.read()
    assert isinstance(message, bytes), "the stream has ended"
    return kv_frames.decode(message, STREAM_ID, sequence)[0]


async def read_all(call: grpc.aio.UnaryStreamCall[Any, bytes]) -> int:
    """How many messages were left."""
    num_messages = 0
    while isinstance(await call.read(), bytes):
        num_messages += 1
    return num_messages
