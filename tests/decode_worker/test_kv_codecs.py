"""The codec that a decode worker's config names is what its prefill workers send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgpack
import pytest

from colm_serve.proto.colm.v1 import prefill_pb2
from tests.helpers import GREEDY, decode_service, generate_alone, make_prompt, prefill_service
from tests.relay import Relay, end
from tests.worker_clients import DecodeClient, decode_client


@asynccontextmanager
async def recorded(
    folder: Path, kv_codec: str, pause_s: float = 0.0
) -> AsyncIterator[tuple[DecodeClient, str, list[str]]]:
    """A decode worker, the address of a prefill worker, and the codecs of what that sends."""
    sent: list[str] = []

    def look(messages: list[bytes], _: list[bytes]) -> list[bytes]:
        sent.append(msgpack.unpackb(prefill_pb2.KvFrame.FromString(messages[0]).header)["codec"])
        return messages

    async with AsyncExitStack() as stack:
        prefill, _ = stack.enter_context(prefill_service(folder))
        decode, worker = stack.enter_context(decode_service(folder, kv_codec=kv_codec))
        client = await stack.enter_async_context(decode_client(decode.address, worker.kv_identity))
        relay = Relay(prefill.address, look, end, pause_s)
        address = await relay.start()
        stack.push_async_callback(relay.stop)
        yield client, address, sent


@pytest.mark.parametrize(
    ("kv_codec", "expected"),
    [("raw", "raw"), ("bf16", "bf16"), ("int8", "int8"), ("fp8", "fp8"), ("auto", "raw")],
)
async def test_the_codec_of_the_config_is_sent(folder: Path, kv_codec: str, expected: str) -> None:
    prompt = make_prompt(50)
    async with recorded(folder, kv_codec) as (client, address, sent):
        got = await client.generate(prompt, 3, GREEDY, (address,))
    assert got.num_shipped == 49
    assert sent == [expected]
    if expected == "raw":
        assert got.tokens == generate_alone(folder, prompt, [3] * 8)


async def test_auto_turns_to_the_smallest_codec_on_a_link_that_no_codec_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colm_serve.decode_worker.codec_choice.MIN_TRANSFER_BYTES", 1)
    async with recorded(folder, "auto", pause_s=0.1) as (client, address, sent):
        for seed in (1, 2):
            got = await client.generate(make_prompt(50, seed=seed), 3, GREEDY, (address,))
            assert got.num_shipped == 49
    assert sent == ["raw", "int8"]
