"""A thousand ways to damage recorded KV streams: right to the last byte, or a typed error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm_serve.core import PrefillRequest
from colm_serve.decode_worker.frame_writer import FrameWriter
from colm_serve.errors import DataLoss, Incompatible
from colm_serve.kv.ledger import PageLedger
from colm_serve.kv.pool import KvPool
from colm_serve.transport.codecs import CODECS
from colm_serve.transport.kv_frames import EndFrame, decode
from tests.engine.paged import kv_of_whole_model
from tests.frame_mutations import KINDS, Mutation
from tests.helpers import make_prompt, prefill_service
from tests.worker_clients import prefill_client

NUM_TOKENS, SHIP_FROM, PAGE_SIZE = 75, 5, 16
NUM_PAGES = 8
EPOCH = 3
UNWRITTEN = -1.5


@dataclass(frozen=True)
class Recording:
    """What a real prefill worker answered to a request, and to another one."""

    request: PrefillRequest
    messages: list[bytes] = field(repr=False)
    foreign: list[bytes] = field(repr=False)

    @cached_property
    def kv(self) -> torch.Tensor:
        """What the undamaged stream brings."""
        receiver = Receiver(self)
        assert receiver.receive(self.messages)
        return receiver.kv


@pytest.fixture(scope="module", params=CODECS)
def recording(folder: Path, request: pytest.FixtureRequest) -> Recording:
    """In chunks, so that every layer comes in several frames."""
    codec: str = request.param

    async def record() -> Recording:
        with prefill_service(folder, epoch=EPOCH, chunk_tokens=32) as (service, worker):
            identity = worker.kv_identity
            async with prefill_client(service.address, identity, worker.layout) as client:
                ours = replace(client.request(make_prompt(NUM_TOKENS), SHIP_FROM), codec=codec)
                other = replace(ours, tokens=make_prompt(NUM_TOKENS, seed=2), stream_id=99)
                messages = [await client.messages(each) for each in (ours, other)]
        return Recording(ours, *messages)

    return asyncio.run(record())


class Receiver:
    """A pool whose pages hold a marker until they are written, and one sequence's part of it."""

    def __init__(self, recording: Recording) -> None:
        layout = recording.request.layout
        self.pool = KvPool(layout, NUM_PAGES, PAGE_SIZE)
        self.pool.array[:] = UNWRITTEN
        self.ledger = PageLedger(NUM_PAGES)
        self._before = self.ledger.allocate(1)
        self.pages = self.ledger.allocate(-(-NUM_TOKENS // PAGE_SIZE))
        self.table = self.pool.table(self.pages)
        self.writer = FrameWriter(self.pool, self.table, recording.request, EPOCH)

    def receive(self, messages: Sequence[bytes]) -> bool:
        """As `PromptFetcher` does; True when everything came."""
        try:
            for message in messages:
                if isinstance(self.writer.accept(message), EndFrame):
                    return True
        except (DataLoss, Incompatible):
            return False
        return False

    @property
    def kv(self) -> torch.Tensor:
        """[layers, K and V, tokens, heads, head_dim] of the sequence's pages."""
        layers = range(self.pool.layout.num_layers)
        stop = PAGE_SIZE * len(self.pages)
        return torch.stack(
            [torch.stack(self.pool.read(layer, self.table, 0, stop)) for layer in layers]
        )

    def check_nothing_else_was_written(self) -> None:
        kv = self.kv
        assert (kv[:, :, :SHIP_FROM] == UNWRITTEN).all()
        assert (kv[:, :, NUM_TOKENS:] == UNWRITTEN).all()
        pages = self.pool.array.reshape(*self.pool.array.shape[:2], NUM_PAGES, -1)
        others = [page for page in range(NUM_PAGES) if page not in self.pages]
        assert (pages[:, :, others] == UNWRITTEN).all()

    def check_pages_come_back(self) -> None:
        self.ledger.release(self.pages)
        self.ledger.release(self._before)
        self.ledger.check_integrity()
        assert self.ledger.num_free == NUM_PAGES


numbers = st.integers(0, 2**16)
mutations = st.builds(Mutation, st.sampled_from(KINDS), numbers, numbers, numbers)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(damage=st.lists(mutations, min_size=1, max_size=3))
def test_damage_never_becomes_kv(recording: Recording, damage: list[Mutation]) -> None:
    messages = recording.messages
    for mutation in damage:
        messages = mutation.apply(messages, recording.foreign)
    receiver = Receiver(recording)
    is_whole = receiver.receive(messages)
    num_complete = receiver.writer.num_complete
    assert num_complete == NUM_TOKENS if is_whole else messages != recording.messages
    kept = receiver.kv[:, :, SHIP_FROM:num_complete]
    assert torch.equal(kept, recording.kv[:, :, SHIP_FROM:num_complete]), "what is kept is right"
    receiver.check_nothing_else_was_written()
    receiver.check_pages_come_back()


def test_no_flipped_bit_goes_unseen(recording: Recording) -> None:
    """One of every byte of every frame, header, payload and digest."""
    chance = random.Random(0)
    for sequence, message in enumerate(recording.messages):
        damaged = bytearray(message)
        for at in range(len(message)):
            damaged[at] ^= 1 << chance.randrange(8)
            with pytest.raises(DataLoss):
                decode(bytes(damaged), recording.request.stream_id, sequence)
            damaged[at] = message[at]


def test_what_is_received_is_the_models_own_kv(recording: Recording, folder: Path) -> None:
    """To the error that the codec allows."""
    of_scale = {"raw": 1e-5, "bf16": 2**-8, "int8": 2**-6, "fp8": 2**-4}[recording.request.codec]
    of_model = kv_of_whole_model(folder, recording.request.tokens, level=3)
    for layer, k_v in of_model.items():
        for got, expected in zip(recording.kv[layer], k_v, strict=True):
            error = (got[SHIP_FROM:NUM_TOKENS] - expected[SHIP_FROM:]).abs().max()
            assert error <= of_scale * expected.abs().max()
