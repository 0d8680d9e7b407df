"""Mooncake's public traces: a JSON object per line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

`timestamp` is in milliseconds; each of `hash_ids` stands for 512 tokens of the prompt and all
before them, the last one for those that are left.
Source: https://github.com/kvcache-ai/Mooncake (FAST '25 release).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_serve.errors import InvalidArgument
from colm_serve.simulate.trace import Block, TracedRequest

BLOCK_TOKENS = 512
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class MooncakeTrace:
    """A JSONL file, read as it is played.

    Raises while it is read:
        InvalidArgument: a line is not what it has to be; names file, line and field.
    """

    path: Path

    def requests(self) -> Iterator[TracedRequest]:
        last_ms = 0.0
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                entry = _Entry.parse(line, f"{self.path}, line {number}", last_ms)
                last_ms = entry.timestamp
                yield TracedRequest(entry.timestamp / 1e3, entry.blocks(), entry.output_length)


@dataclass(frozen=True)
class _Entry:
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]

    @classmethod
    def parse(cls, line: str, where: str, last_ms: float) -> _Entry:
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidArgument(where, line.strip(), f"a JSON object ({error})") from error
        if not isinstance(raw, dict):
            raise InvalidArgument(where, raw, f"a JSON object of {', '.join(_FIELDS)}")
        for name in _FIELDS:
            if name not in raw:
                raise InvalidArgument(f"{where}, {name}", None, "a value: the field is missing")
        timestamp = raw["timestamp"]
        if not _is_number(timestamp) or not last_ms <= timestamp < float("inf"):
            allowed = f"milliseconds, at least the {last_ms:g} of the line before"
            raise InvalidArgument(f"{where}, timestamp", timestamp, allowed)
        for name in ("input_length", "output_length"):
            if not _is_int(raw[name]) or raw[name] < 1:
                raise InvalidArgument(f"{where}, {name}", raw[name], "a whole number from 1")
        hash_ids = raw["hash_ids"]
        if not isinstance(hash_ids, list) or not all(_is_int(i) and i >= 0 for i in hash_ids):
            raise InvalidArgument(f"{where}, hash_ids", hash_ids, "a list of whole numbers from 0")
        num_blocks = -(-raw["input_length"] // BLOCK_TOKENS)
        if len(hash_ids) != num_blocks:
            allowed = f"{num_blocks}, one for each {BLOCK_TOKENS} tokens of input_length"
            raise InvalidArgument(f"{where}, hash_ids", f"{len(hash_ids)} ids", allowed)
        return cls(timestamp, raw["input_length"], raw["output_length"], hash_ids)

    def blocks(self) -> tuple[Block, ...]:
        num_last = self.input_length - BLOCK_TOKENS * (len(self.hash_ids) - 1)
        sizes = [BLOCK_TOKENS] * (len(self.hash_ids) - 1) + [num_last]
        return tuple(map(Block, self.hash_ids, sizes))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)
