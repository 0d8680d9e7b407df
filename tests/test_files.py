"""What a full disk keeps from being written is named, and what was there stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from colm_serve.engine.sparse.pattern_file import HeadPattern, save_patterns
from colm_serve.engine.sparse.selectors import Dense
from colm_serve.errors import WriteFailed
from colm_serve.files import new_folder, write_atomically
from tests.full_disk import full_disk
from tests.simulate.clusters import COSTS


def test_a_file_keeps_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with full_disk(10), pytest.raises(WriteFailed, match=r"state\.json: cannot be written"):
        write_atomically(path, "new, and longer")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("state.json", "old")]


def test_a_folder_keeps_its_old_files(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with new_folder(path) as staging:
        (staging / "a").write_text("old")
    with (
        full_disk(10),
        pytest.raises(WriteFailed, match="model: cannot be written"),
        new_folder(path) as staging,
    ):
        (staging / "a").write_text("new, and longer")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (path / "a").read_text() == "old"


@pytest.mark.parametrize(
    "write",
    [
        COSTS.save,
        lambda path: save_patterns(path, [[HeadPattern(Dense(), 1.0)]]),
        lambda path: write_atomically(path, "x"),
    ],
    ids=["costs", "patterns", "any"],
)
def test_a_file_without_a_folder_is_named(tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(WriteFailed, match=r"missing/file: cannot be written.*No such file"):
        write(path)
