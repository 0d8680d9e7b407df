"""What the frame writer accepts, and that everything else is a typed error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from colm_serve.core import KvLayout, PrefillRequest
from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.errors import ColmError, DataLoss, Incompatible, Unavailable
from colm_serve.kv.pool import KvPool
from colm_serve.transport.kv_frames import (
    EndFrame,
    Frame,
    KvFrame,
    OpenFrame,
    WaitFrame,
    encode,
)

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32")
START, STOP = 3, 9
REQUEST = PrefillRequest("r", (0,) * STOP, START, "weights", LAYOUT, stream_id=77)
OPENING = OpenFrame(0, 5, "weights", LAYOUT, "raw", "message", 0, 0, 0.0)


@pytest.fixture
def pool() -> KvPool:
    return KvPool(LAYOUT, num_pages=4, page_size=4)


@pytest.fixture
def writer(pool: KvPool) -> FrameWriter:
    """It has the opening."""
    writer = FrameWriter(pool, pool.table([2, 0, 3]), REQUEST, epoch=5)
    writer.accept(message(OPENING))
    return writer


def message(frame: Frame, payload: bytes = b"", stream_id: int = 77) -> bytes:
    return encode(frame, stream_id, [payload])


def kv(
    sequence: int, layer: int, start: int, num_tokens: int, num_bytes: int | None = None
) -> bytes:
    """K is the tokens' positions + 1, V their negatives."""
    positions = torch.arange(start, start + num_tokens, dtype=torch.float32) + 1
    k_v = torch.stack([positions, -positions])[..., None, None].expand(-1, -1, 1, 2)
    payload = k_v.contiguous().numpy().tobytes()
    if num_bytes is not None:
        payload = (payload + bytes(64))[:num_bytes]
    return message(KvFrame(sequence, layer, start, num_tokens), payload)


def test_frames_fill_exactly_their_tokens(pool: KvPool, writer: FrameWriter) -> None:
    messages = [
        kv(1, 0, 3, 4), kv(2, 1, 3, 4), message(WaitFrame(3)), kv(4, 0, 7, 2), kv(5, 1, 7, 2),
    ]  # fmt: skip
    complete = []
    for each in messages:
        assert not isinstance(writer.accept(each), EndFrame)
        complete.append(writer.num_complete)
    assert complete == [3, 7, 7, 7, 9]
    assert isinstance(writer.accept(message(EndFrame(6, 0.1))), EndFrame)
    for layer in range(2):
        k, v = pool.read(layer, pool.table([2, 0, 3]), 0, 12)
        expected = torch.tensor([0, 0, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0], dtype=torch.float32)
        assert torch.equal(k[:, 0, 0], expected)
        assert torch.equal(v[:, 0, 1], -expected)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda: kv(2, 0, 7, 2), "got frame 2"),
        (lambda: kv(3, 0, 8, 1), r"expected from 7, up to 9"),
        (lambda: kv(3, 0, 6, 2), r"expected from 7, up to 9"),
        (lambda: kv(3, 0, 3, 4), r"expected from 7, up to 9"),
        (lambda: kv(3, 0, 7, 3), r"expected from 7, up to 9"),
        (lambda: kv(3, 0, 7, 0), r"expected from 7, up to 9"),
        (lambda: kv(3, 2, 7, 2), "layer 2; there are 2"),
        (lambda: kv(3, 0, 7, 2, num_bytes=31), "payload of 31 bytes; expected 32"),
        (lambda: kv(3, 0, 7, 2, num_bytes=33), "payload of 33 bytes; expected 32"),
        (lambda: message(KvFrame(3, 0, 7, 2)), "payload of 0 bytes"),
        (lambda: message(KvFrame(3, 0, 7, 2), bytes(32), stream_id=78), "another stream"),
        (lambda: message(EndFrame(3, 0.1)), "ended with 7 of 9"),
        (lambda: message(replace(OPENING, sequence=3)), "OpenFrame in its place"),
        (lambda: b"", "does not match its digest"),
        (lambda: kv(3, 0, 7, 2)[:-1], "truncated"),
    ],
)
def test_what_does_not_follow_is_data_loss_and_not_written(
    pool: KvPool, writer: FrameWriter, bad: Callable[[], bytes], why: str
) -> None:
    writer.accept(kv(1, 0, 3, 4))
    writer.accept(kv(2, 1, 3, 4))
    before = [part.clone() for part in pool.read(0, pool.table(range(4)), 0, 16)]
    with pytest.raises(DataLoss, match=why):
        writer.accept(bad())
    assert writer.num_complete == 7
    after = pool.read(0, pool.table(range(4)), 0, 16)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_layer_that_is_behind_counts(writer: FrameWriter) -> None:
    writer.accept(kv(1, 0, 3, 6))
    assert writer.num_complete == START
    with pytest.raises(DataLoss, match="ended with 3 of 9"):
        writer.accept(message(EndFrame(2, 0.1)))


@pytest.mark.parametrize(
    ("opening", "error", "why"),
    [
        (replace(OPENING, epoch=6), Unavailable, "epoch: asked worker 5, 6 answers"),
        (replace(OPENING, kv_identity="others"), Incompatible, "kv_identity: .*'others'"),
        (replace(OPENING, layout=replace(LAYOUT, head_dim=4)), Incompatible, "layout"),
        (replace(OPENING, layout=replace(LAYOUT, dtype="float16")), Incompatible, "layout"),
        (replace(OPENING, codec="zip"), Incompatible, "codec: asked for 'raw', .*'zip'"),
        (replace(OPENING, path="pigeon"), Incompatible, "path"),
        (KvFrame(0, 0, 3, 4), DataLoss, "KvFrame in its place"),
        (WaitFrame(0), DataLoss, "WaitFrame in its place"),
        (EndFrame(0, 0.1), DataLoss, "EndFrame in its place"),
    ],
)
def test_without_a_fitting_opening_nothing_is_taken(
    pool: KvPool, opening: Frame, error: type[ColmError], why: str
) -> None:
    writer = FrameWriter(pool, pool.table([2, 0, 3]), REQUEST, epoch=5)
    with pytest.raises(error, match=why):
        writer.accept(message(opening))


def test_an_epoch_is_compared_only_where_one_is_known(pool: KvPool) -> None:
    writer = FrameWriter(pool, pool.table([2, 0, 3]), REQUEST)
    assert writer.accept(message(OPENING)) == OPENING
