"""The bad requests of `neighbours.py`, each sent by a process of its own.

python benchmarks/offenders.py NAME HTTP_ADDRESS GRPC_ADDRESS: says that it is ready, begins at a
line on its standard input, and prints what its requests were answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from colm_serve.client import AsyncClient, Token
from colm_serve.errors import ColmError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: What an ambiguous grammar and a client that cancels take in all.
NUM_AMBIGUOUS_TOKENS = 500
NUM_CANCELS_PER_S, CANCELLING_S = 200, 5
UNREAD_S = 20.0
#: The bundled model's token for a byte that begins no character.
UNDECODABLE_BYTE = 0x80


@dataclass(frozen=True)
class Body:
    """A request by HTTP; one that is `refused` is so by its size."""

    path: str
    body: bytes
    refused: bool


Act = Callable[[str, str], Awaitable[None]]


def completion(*, refused: bool = False, **fields: object) -> Body:
    body = {"prompt": "def f(", "max_tokens": 16, **fields}
    return Body(COMPLETIONS, json.dumps(body).encode(), refused)


def schema(**keywords: object) -> dict[str, Any]:
    return {"structured_outputs": {"json": {"type": "object", **keywords}}}


def properties(number: int) -> dict[str, object]:
    return {f"property_{i}": {"type": "string"} for i in range(number)}


def _messages(number: int) -> Body:
    messages = [{"role": "user", "content": "x"}] * number
    return Body(CHAT, json.dumps({"messages": messages}).encode(), refused=True)


def pattern_of(length: int) -> str:
    """Few characters that mean a large automaton."""
    part = "(a{1,60}|b{1,60}c{1,60}){1,60}"
    return (part * (length // len(part) + 1))[: length // len(part) * len(part)]


async def _undecodable(http_address: str, grpc_address: str) -> None:
    """16,000 tokens none of which is a character, in texts as long as the model's context."""
    async with httpx.AsyncClient(base_url=http_address, timeout=110) as http:
        body = {
            "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "temperature": 0, "level": 1,
            "logit_bias": {str(undecodable_token()): 100}, "stream": True,
        }  # fmt: skip
        await asyncio.gather(*(http.post(COMPLETIONS, json=body) for _ in range(4)))


def undecodable_token() -> int:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file("models/stdlib-air/tokenizer.json").get_vocab()
    # Byte-level BPE writes this byte as the first character beyond the printable ones.
    return next(vocabulary[text] for text in ("Ģ", "Ä¢") if text in vocabulary)


async def _unread(http_address: str, grpc_address: str) -> None:
    """A stream by HTTP and one by gRPC whose client takes nothing of them."""
    host, _, port = http_address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**10)
    body = json.dumps(
        {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20}
    )
    writer.write(
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    async with AsyncClient(grpc_address) as client:
        stream = client.generate("x", max_tokens=4000, ignore_eos=True, logprobs=20)
        await anext(stream)
        await asyncio.sleep(UNREAD_S)
        await stream.aclose()
    writer.close()
    del reader


async def _cancels(http_address: str, grpc_address: str) -> None:
    async with AsyncClient(grpc_address) as client:

        async def one() -> None:
            with suppress(ColmError):
                async for event in client.generate("import ", max_tokens=200, ignore_eos=True):
                    if isinstance(event, Token):
                        break

        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CANCELS_PER_S * CANCELLING_S):
                task = tasks.create_task(one())
                asyncio.get_running_loop().call_later(0.05, task.cancel)
                await asyncio.sleep(1 / NUM_CANCELS_PER_S)


OFFENDERS: dict[str, Body | Act] = {
    "a prompt of 10 MB": completion(prompt="x = 1\n" * (10_000_000 // 6), refused=True),
    "100,000 prompts": completion(prompt=["x"] * 100_000, refused=True),
    "10,000 messages": _messages(10_000),
    "a stop list of 1 MB": completion(stop=["s" * 100] * 10_000, refused=True),
    "a schema of 700 properties": completion(**schema(properties=properties(700))),
    "a schema of 5,000 properties": completion(
        **schema(properties=properties(5_000)), refused=True
    ),
    "a pattern of 300 characters": completion(
        **schema(properties={"x": {"type": "string", "pattern": pattern_of(300)}})
    ),
    "an ambiguous grammar": completion(
        structured_outputs={"grammar": "root ::= s\ns ::= s s s | s s | [a-z]"},
        max_tokens=NUM_AMBIGUOUS_TOKENS,
    ),
    "16,000 undecodable tokens": _undecodable,
    "a key of 5,000 digits": completion(logit_bias={"1" * 5_000: 1}, refused=True),
    "a client that stops reading": _unread,
    "200 cancels a second": _cancels,
}


async def offend(name: str, http_address: str, grpc_address: str) -> None:
    act = OFFENDERS[name]
    if not isinstance(act, Body):
        print(json.dumps({}), flush=True)
        sys.stdin.readline()
        await act(http_address, grpc_address)
        print(json.dumps({}), flush=True)
        return
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=http_address, timeout=110, headers=headers) as http:
        await http.get("/health")
        print(json.dumps({}), flush=True)
        sys.stdin.readline()
        begin = time.perf_counter()
        answer = await http.post(act.path, content=act.body)
        answer_ms = (time.perf_counter() - begin) * 1e3
    said = {"answer_ms": answer_ms, "status": answer.status_code, "text": answer.text[:200]}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(offend(*sys.argv[1:]))
