"""`colm search-patterns` over the bundled model: a file that workers read, or what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from colm_serve.engine.sparse.pattern_file import load_patterns
from colm_serve.errors import InvalidArgument
from colm_serve.model.config import ColmConfig
from colm_serve.pattern_search import patterns_table, write_pattern_file

BUNDLED = Path(__file__).parents[1] / "models" / "stdlib-air"


@pytest.mark.parametrize(
    "data", [(), (Path(__file__), Path(pytest.__file__))], ids=["own", "given"]
)
def test_the_file_is_what_was_found(tmp_path: Path, data: tuple[Path, ...]) -> None:
    out = tmp_path / "patterns.json"
    layers = write_pattern_file(BUNDLED, out, data, 512, 0.5)
    config = ColmConfig.load(BUNDLED)
    assert load_patterns(out, config.num_layers, config.heads_per_chain[0]) == layers
    assert patterns_table(layers).row_count == config.num_layers * config.heads_per_chain[0]


@pytest.mark.parametrize(
    ("num_tokens", "budget", "data", "says"),
    [
        (63, 0.5, (), "tokens: 63.*64 to 4096"),
        (4097, 0.5, (), "tokens: 4097.*64 to 4096"),
        (512, 0.0, (), "budget: 0.0.*above 0"),
        (512, 1.5, (), "budget: 1.5.*at most 1"),
        (4096, 0.5, (Path(pytest.__file__),), "tokens: 4096.*at most the text's"),
        (512, 0.5, (Path("missing.txt"),), "data: 'missing.txt'.*readable text"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, num_tokens: int, budget: float, data: tuple[Path, ...], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        write_pattern_file(BUNDLED, tmp_path / "p.json", data, num_tokens, budget)
