"""Pattern files: read back as written, and refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colm_serve.engine.sparse.antidiagonal import Antidiagonal
from colm_serve.engine.sparse.pattern_file import HeadPattern, load_patterns, save_patterns
from colm_serve.engine.sparse.selectors import AShape, BlockSparse, Dense, VerticalSlash
from colm_serve.errors import InvalidConfig

PATTERNS = [
    [HeadPattern(VerticalSlash(1000, 6096), 0.91), HeadPattern(AShape(128, 1024), 0.99)],
    [HeadPattern(BlockSparse(100), 0.5), HeadPattern(Dense(), 1.0)],
]


def test_patterns_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    save_patterns(path, PATTERNS)
    assert load_patterns(path, 2, 2) == PATTERNS


def test_a_file_of_minference_is_read(tmp_path: Path) -> None:
    """An entry as in its configs, whose scores are sums of errors as often as shares."""
    path = tmp_path / "patterns.json"
    path.write_text('[{"0": ["vertical_and_slash", 1000, 6096, 336]}]', "utf-8")
    assert load_patterns(path, 1, 1) == [[HeadPattern(VerticalSlash(1000, 6096), 336)]]


def test_what_no_file_holds_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Antidiagonal"):
        save_patterns(tmp_path / "patterns.json", [[HeadPattern(Antidiagonal(0.9), 1.0)]])


GOOD = ["dense", 0, 0, 1.0]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, "a list of 2, an object per layer"),
        ([{"0": GOOD, "1": GOOD}], "'a list of 1'.*a list of 2"),
        ([{"0": GOOD, "1": GOOD}, {"0": GOOD}], r"layer 1: \['0'\].*heads 0 to 1 of chain 1"),
        ([{"0": GOOD, "1": GOOD}, []], r"layer 1: \[\].*heads 0 to 1"),
        ([{"0": GOOD, "1": GOOD[:3]}] * 2, r"layer 0, head 1: \['dense', 0, 0\].*second, score"),
        ([{"0": ["slash", 0, 0, 1], "1": GOOD}] * 2, "layer 0, head 0, type: 'slash'.*stream_llm"),
        ([{"0": [["dense"], 0, 0, 1], "1": GOOD}] * 2, r"head 0, type: \['dense'\]"),
        ([{"0": ["dense", -1, 0, 1], "1": GOOD}] * 2, "head 0, first: -1.*at least 0"),
        ([{"0": ["dense", 0, 1.5, 1], "1": GOOD}] * 2, "head 0, second: 1.5.*an integer"),
        ([{"0": ["dense", 0, 0, "x"], "1": GOOD}] * 2, "head 0, score: 'x'.*a number"),
        ([{"0": ["block_sparse", 0, 0, 1], "1": GOOD}] * 2, "first: 0.*at least 1 key block"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, raw: Any, says: str) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(InvalidConfig, match=says):
        load_patterns(path, 2, 2)


def test_no_file_and_no_json_are_named(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    with pytest.raises(InvalidConfig, match=r"patterns\.json.*No such file"):
        load_patterns(path, 1, 1)
    path.write_text("[", "utf-8")
    with pytest.raises(InvalidConfig, match=r"patterns\.json.*readable JSON"):
        load_patterns(path, 1, 1)
