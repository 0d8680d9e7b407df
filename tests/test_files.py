"""What cannot be written is named and what was there stays, whatever the disk and whoever dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from colm_serve import files
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


def write_folder(path: Path, content: str) -> None:
    with new_folder(path) as staging:
        (staging / "a").write_text(content)


def contents(path: Path) -> dict[str, str]:
    """Every file's, hidden ones too."""
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def _any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_any_file_system")
def test_a_folder_takes_the_place_of_another_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "new" / "model", "old")
    (tmp_path / "new" / "model" / "b").touch()
    write_folder(tmp_path / "new" / "model", "new")
    assert contents(tmp_path) == {"new/model/a": "new"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_rename_that_fails_half_way_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "model", "old")
    rename, num_renamed = os.rename, 0

    def fail_once(source: Path, target: Path) -> None:
        nonlocal num_renamed
        num_renamed += 1
        if num_renamed == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(WriteFailed, match=r"model: cannot be written.*Input/output"):
        write_folder(tmp_path / "model", "new")
    assert num_renamed == 3
    assert contents(tmp_path) == {"model/a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("_any_file_system")
def test_what_a_death_between_two_renames_left_is_put_back(tmp_path: Path) -> None:
    write_folder(tmp_path / ".model.colm-old", "old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"model/a": "old"}
    write_folder(tmp_path / ".model.colm-old", "older")
    write_folder(tmp_path / "model", "new")
    assert contents(tmp_path) == {"model/a": "new"}


def test_what_dead_writers_left_goes_away_and_what_live_ones_write_stays(tmp_path: Path) -> None:
    (tmp_path / ".model.0a1b2c3d.colm-tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".other.0a1b2c3d.colm-tmp").mkdir()
    with new_folder(tmp_path / "model") as staging:
        (staging / "a").write_text("slow")
        write_folder(tmp_path / "other", "quick")
        assert contents(staging) == {"a": "slow"}
    assert contents(tmp_path) == {"model/a": "slow", "other/a": "quick"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_two_writers_of_a_folder_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, "old")
    with new_folder(path) as first:
        (first / "a").write_text("first")
        with new_folder(path) as second:
            (second / "a").write_text("second")
            (second / "b").write_text("second")
        assert contents(path) == {"a": "second", "b": "second"}
    assert contents(tmp_path) == {"model/a": "first"}


def test_a_folder_that_others_have_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def write_both() -> None:
        with new_folder(path) as staging:
            (staging / "a").write_text("ours")
            path.mkdir()
            (path / "a").write_text("theirs")

    with pytest.raises(WriteFailed, match="model: cannot be written"):
        write_both()
    assert contents(tmp_path) == {"model/a": "theirs"}


def test_what_cannot_be_replaced_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file", "file: cannot be written: .*not a folder"),
        (Path("/proc"), "/proc: cannot be written: .*a mount point cannot be replaced"),
    ):
        with pytest.raises(WriteFailed, match=message):
            write_folder(path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
