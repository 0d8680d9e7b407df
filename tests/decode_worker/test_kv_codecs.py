"""The codec that a decode worker's config names is what its prefill workers send."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import msgpack
import pytest

from colm_serve.proto.colm.v1 import prefill_pb2
from tests.helpers import GREEDY, decode_service, generate_alone, make_prompt, prefill_service
from tests.relay import Relay, end
from tests.worker_clients import decode_client


@pytest.mark.parametrize(
    ("kv_codec", "expected"),
    [("raw", "raw"), ("bf16", "bf16"), ("int8", "int8"), ("fp8", "fp8"), ("auto", "raw")],
)
async def test_the_codec_of_the_config_is_sent(folder: Path, kv_codec: str, expected: str) -> None:
    sent = []

    def look(messages: list[bytes], _: list[bytes]) -> list[bytes]:
        sent.append(msgpack.unpackb(prefill_pb2.KvFrame.FromString(messages[0]).header)["codec"])
        return messages

    prompt = make_prompt(50)
    async with AsyncExitStack() as stack:
        prefill, _ = stack.enter_context(prefill_service(folder))
        decode, worker = stack.enter_context(decode_service(folder, kv_codec=kv_codec))
        client = await stack.enter_async_context(decode_client(decode.address, worker.kv_identity))
        relay = Relay(prefill.address, look, end)
        address = await relay.start()
        stack.push_async_callback(relay.stop)
        got = await client.generate(prompt, 3, GREEDY, (address,))
    assert got.num_shipped == 49
    assert sent == [expected]
    if expected == "raw":
        assert got.tokens == generate_alone(folder, prompt, [3] * 8)
