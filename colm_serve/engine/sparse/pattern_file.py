"""MInference's pattern files: which pattern each head follows, found once per model.

A JSON list with an object per layer, from each head's number to [type, first, second, score]:

    stream_llm          first positions, positions up to the row's own
    vertical_and_slash  columns, slashes
    block_sparse        key blocks per query block, not read (MInference reads neither, takes 100)
    dense               not read, not read (ours: MInference has no such type)

The score is the attention mass that the pattern kept when it was chosen. Heads are chain 1's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_serve.engine.sparse.selectors import AShape, BlockSparse, Dense, Selector, VerticalSlash
from colm_serve.errors import InvalidConfig
from colm_serve.files import write_atomically

_TYPES = ("stream_llm", "vertical_and_slash", "block_sparse", "dense")
_ENTRY = "[type, first, second, score]"


@dataclass(frozen=True)
class HeadPattern:
    """One head's pattern and the attention mass that it kept, 0 to 1."""

    selector: Selector
    score: float

    def to_json(self) -> list[str | int | float]:
        match self.selector:
            case AShape(num_first, num_local):
                return ["stream_llm", num_first, num_local, self.score]
            case VerticalSlash(num_verticals, num_slashes):
                return ["vertical_and_slash", num_verticals, num_slashes, self.score]
            case BlockSparse(num_blocks):
                return ["block_sparse", num_blocks, 0, self.score]
            case Dense():
                return ["dense", 0, 0, self.score]
        raise TypeError(f"no pattern file can hold {self.selector}")


def save_patterns(path: Path, layers: Sequence[Sequence[HeadPattern]]) -> None:
    """Write the patterns of each layer's heads, a layer a line.

    Raises:
        WriteFailed: as on a full disk.
    """
    lines = [
        json.dumps({str(head): pattern.to_json() for head, pattern in enumerate(heads)})
        for heads in layers
    ]
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def load_patterns(path: Path, num_layers: int, num_heads: int) -> list[list[HeadPattern]]:
    """Read the patterns of each layer's chain-1 heads.

    Raises:
        InvalidConfig: no readable file, or not of this many layers and heads; names the layer,
            the head, the value and what is allowed.
    """
    try:
        layers = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig("pattern_file", str(path), f"a readable JSON file ({error})") from error
    if not isinstance(layers, list) or len(layers) != num_layers:
        found = f"a list of {len(layers)}" if isinstance(layers, list) else layers
        raise InvalidConfig(str(path), found, f"a list of {num_layers}, an object per layer")
    return [_read_layer(f"{path}: layer {i}", raw, num_heads) for i, raw in enumerate(layers)]


def _read_layer(where: str, raw: Any, num_heads: int) -> list[HeadPattern]:
    heads = [str(head) for head in range(num_heads)]
    if not isinstance(raw, dict) or set(raw) != set(heads):
        found = sorted(raw) if isinstance(raw, dict) else raw
        raise InvalidConfig(where, found, f"an object with heads 0 to {num_heads - 1} of chain 1")
    return [_read_head(f"{where}, head {head}", raw[head]) for head in heads]


def _read_head(where: str, raw: Any) -> HeadPattern:
    if not isinstance(raw, list) or len(raw) != 4:
        raise InvalidConfig(where, raw, _ENTRY)
    kind, first, second, score = raw
    if kind not in _TYPES:
        raise InvalidConfig(f"{where}, type", kind, ", ".join(_TYPES))
    for name, value in (("first", first), ("second", second)):
        if type(value) is not int or value < 0:
            raise InvalidConfig(f"{where}, {name}", value, "an integer of at least 0")
    if type(score) not in (int, float):
        raise InvalidConfig(f"{where}, score", score, "a number")
    return HeadPattern(_selector(where, kind, first, second), score)


def _selector(where: str, kind: str, first: int, second: int) -> Selector:
    match kind:
        case "stream_llm":
            return AShape(first, second)
        case "vertical_and_slash":
            return VerticalSlash(first, second)
        case "block_sparse":
            if first == 0:
                raise InvalidConfig(f"{where}, first", first, "at least 1 key block")
            return BlockSparse(first)
    return Dense()
