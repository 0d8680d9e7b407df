"""`colm import-llama` and `colm export-llama`, as typed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from colm_serve.cli import main
from tests.convert.llamas import read_tensors
from tests.full_disk import full_disk

Colm = Callable[..., int]


@pytest.fixture
def colm(monkeypatch: pytest.MonkeyPatch) -> Colm:
    """The command; returns its status."""

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["colm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_there_and_back(
    colm: Colm,
    llama_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = read_tensors(llama_of("grouped"))
    said = f"{sum(tensor.numel() for tensor in expected.values()):,} parameters written to"
    assert colm("import-llama", llama_of("grouped"), tmp_path / "colm") == 0
    assert said in capsys.readouterr().out
    assert colm("export-llama", tmp_path / "colm", tmp_path / "back") == 0
    assert said in capsys.readouterr().out
    assert read_tensors(tmp_path / "back").keys() == expected.keys()


def test_a_refusal_is_one_line(
    colm: Colm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert colm("import-llama", tmp_path, tmp_path / "colm") == 2
    expected = f"CheckpointError: {tmp_path / 'config.json'}: no such file\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_bytes", [100, 20_000], ids=["header", "weights"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    colm: Colm,
    llama_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_bytes: int,
) -> None:
    with full_disk(num_bytes):
        assert colm("import-llama", llama_of("grouped"), tmp_path / "colm") == 2
    said = capsys.readouterr().err
    assert said.startswith("WriteFailed: ")
    assert said.endswith("chain-1.safetensors: cannot be written: [Errno 27] File too large\n")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
