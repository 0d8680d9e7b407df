"""What the frame writer accepts, and that everything else is DataLoss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from colm_serve.core import KvLayout
from colm_serve.decode_worker.prompt_kv import FrameWriter
from colm_serve.errors import DataLoss
from colm_serve.kv.pool import KvPool
from colm_serve.transport.kv_frames import encode_end, encode_kv

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32")
START, STOP = 3, 9


@pytest.fixture
def pool() -> KvPool:
    return KvPool(LAYOUT, num_pages=4, page_size=4)


@pytest.fixture
def writer(pool: KvPool) -> FrameWriter:
    return FrameWriter(pool, pool.table([2, 0, 3]), LAYOUT, START, STOP)


def frame(
    sequence: int, layer: int, start: int, num_tokens: int, num_bytes: int | None = None
) -> bytes:
    """K is the tokens' positions + 1, V their negatives."""
    positions = torch.arange(start, start + num_tokens, dtype=torch.float32) + 1
    k_v = torch.stack([positions, -positions])[..., None, None].expand(-1, -1, 1, 2)
    payload = k_v.contiguous().numpy().tobytes()
    if num_bytes is not None:
        payload = (payload + bytes(64))[:num_bytes]
    return encode_kv(sequence, layer, start, num_tokens, [payload])


def test_frames_fill_exactly_their_tokens(pool: KvPool, writer: FrameWriter) -> None:
    messages = [frame(0, 0, 3, 4), frame(1, 1, 3, 4), frame(2, 0, 7, 2), frame(3, 1, 7, 2)]
    complete = []
    for message in messages:
        assert not writer.accept(message)
        complete.append(writer.num_complete)
    assert complete == [3, 7, 7, 9]
    assert writer.accept(encode_end(4, 4, 0.1))
    for layer in range(2):
        k, v = pool.read(layer, pool.table([2, 0, 3]), 0, 12)
        expected = torch.tensor([0, 0, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0], dtype=torch.float32)
        assert torch.equal(k[:, 0, 0], expected)
        assert torch.equal(v[:, 0, 1], -expected)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (lambda: frame(1, 0, 7, 2), "got frame 1|expected"),
        (lambda: frame(2, 0, 8, 1), r"expected from 7, up to 9"),
        (lambda: frame(2, 0, 6, 2), r"expected from 7, up to 9"),
        (lambda: frame(2, 0, 3, 4), r"expected from 7, up to 9"),
        (lambda: frame(2, 0, 7, 3), r"expected from 7, up to 9"),
        (lambda: frame(2, 0, 7, 0), r"expected from 7, up to 9"),
        (lambda: encode_kv(2, 0, 7, -1, [b""]), r"expected from 7, up to 9"),
        (lambda: encode_kv(2, -1, 7, 2, [bytes(32)]), "layer -1; there are 2"),
        (lambda: frame(2, 2, 7, 2), "layer 2; there are 2"),
        (lambda: frame(2, 0, 7, 2, num_bytes=31), "payload of 31 bytes; expected 32"),
        (lambda: frame(2, 0, 7, 2, num_bytes=33), "payload of 33 bytes; expected 32"),
        (lambda: encode_kv(2, 0, 7, 2, []), "payload of 0 bytes"),
        (lambda: encode_end(2, 2, 0.1), "ended with 7 of 9"),
        (lambda: encode_end(2, 3, 0.1), "ended with 7 of 9"),
        (lambda: b"", "unreadable"),
        (lambda: frame(2, 0, 7, 2)[:-1], "truncated"),
    ],
)
def test_what_does_not_follow_is_data_loss_and_not_written(
    pool: KvPool, writer: FrameWriter, message: Callable[[], bytes], why: str
) -> None:
    writer.accept(frame(0, 0, 3, 4))
    writer.accept(frame(1, 1, 3, 4))
    before = [part.clone() for part in pool.read(0, pool.table(range(4)), 0, 16)]
    with pytest.raises(DataLoss, match=why):
        writer.accept(message())
    assert writer.num_complete == 7
    after = pool.read(0, pool.table(range(4)), 0, 16)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_end_that_counts_other_frames_is_data_loss(writer: FrameWriter) -> None:
    writer.accept(frame(0, 0, 3, 6))
    writer.accept(frame(1, 1, 3, 6))
    with pytest.raises(DataLoss):
        writer.accept(encode_end(2, 5, 0.1))


def test_a_layer_that_is_behind_counts(writer: FrameWriter) -> None:
    writer.accept(frame(0, 0, 3, 6))
    assert writer.num_complete == START
    with pytest.raises(DataLoss, match="ended with 3 of 9"):
        writer.accept(encode_end(1, 1, 0.1))
