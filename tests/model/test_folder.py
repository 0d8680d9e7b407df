"""Chains of two saves never come together, and a save leaves the old model or the new one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch

from colm_serve import files
from colm_serve.cli import main
from colm_serve.engine.loading import load_for_serving
from colm_serve.errors import CheckpointError, WriteFailed
from colm_serve.model.chain_file import chain_path
from colm_serve.model.checkpoint import check_folder, load_cpu_model, load_model, save_model
from colm_serve.model.folder import ModelFolder
from colm_serve.model.kv_identity import kv_identity
from tests.full_disk import full_disk
from tests.model.models import read_chain, unseal
from tests.model.retrained import before_open, retrained, saves_in, saves_or_refusal

REPLACED = "of another save|replaced while"
READERS: list[Callable[[Path], object]] = [load_model, load_cpu_model, check_folder]

_KILL_SAVES = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.model.retrained import killed_saves
print(json.dumps(list(killed_saves(Path(sys.argv[1]), json.loads(sys.argv[2])))))
"""
_SAVE_IN_TURNS = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from colm_serve.model.checkpoint import save_model
from tests.model.retrained import retrained
models = [retrained(1.0), retrained(2.0)]
for number in range(int(sys.argv[2])):
    save_model(models[number % 2], Path(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A save of 1.0."""
    save_model(retrained(1.0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A save of 2.0."""
    save_model(retrained(2.0), tmp_path / "later")
    return tmp_path / "later"


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def edit_manifest(folder: Path, **digests: object) -> None:
    """Change digests, or (None) leave them out."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    changed = raw["digests"] | {name.replace("_", "-"): value for name, value in digests.items()}
    raw["digests"] = {name: digest for name, digest in changed.items() if digest is not None}
    path.write_text(json.dumps(raw), "utf-8")


def test_the_manifest_has_the_digests_that_chains_carry(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert raw["format"] == "colm-model-1"
    assert list(raw["digests"]) == ["config.json", *(f"chain-{i}.safetensors" for i in (1, 2, 3))]
    for chain in (1, 2, 3):
        digest = read_chain(folder, chain)[1]["digest"]
        assert raw["digests"][f"chain-{chain}.safetensors"] == digest


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("chain", [2, 3])
def test_a_chain_of_another_save_is_refused_with_both_digests(
    folder: Path, later: Path, read: Callable[[Path], object], chain: int
) -> None:
    digests = [read_chain(path, chain)[1]["digest"] for path in (later, folder)]
    shutil.copy(chain_path(later, chain), chain_path(folder, chain))
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    said = str(caught.value)
    assert said.startswith(f"{chain_path(folder, chain)}: of another save: its digest is ")
    assert [said.index(digest) for digest in digests] == sorted(map(said.index, digests))
    assert "copy or write all of it anew" in said
    load_model(folder, 1)


@pytest.mark.parametrize("read", [*READERS, kv_identity])
def test_another_chain_1_is_refused_where_it_alone_is_read(
    folder: Path, read: Callable[[Path], object]
) -> None:
    other = folder.with_name("other")
    with torch.no_grad():
        model = retrained(1.0)
        model.embedding.weights[0].add_(1)
    save_model(model, other)
    shutil.copy(chain_path(other, 1), chain_path(folder, 1))
    with pytest.raises(CheckpointError, match=r"chain-1\.safetensors: of another save"):
        read(folder)
    with pytest.raises(CheckpointError, match=r"chain-1\.safetensors: of another save"):
        load_for_serving(folder, num_chains=1, with_head=False)


def test_another_save_s_manifest_is_refused(folder: Path, later: Path) -> None:
    shutil.copy(later / "manifest.json", folder)
    for read in READERS:
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors: of another save"):
            read(folder)


def test_a_config_that_is_not_the_manifest_s_is_refused_until_it_is_sealed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    load_model(folder)
    (folder / "config.json").write_text(json.dumps({**raw, "max_context": 32}), "utf-8")
    for read in (*READERS, kv_identity):
        with pytest.raises(CheckpointError, match=r"config\.json: of another save.*`colm seal "):
            read(folder)
    monkeypatch.setattr(sys, "argv", ["colm", "seal", str(folder)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert load_model(folder).model.config.max_context == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "format: nothing; supported: a value of type str"),
        ('{"format": "colm-model-2"}', "format: 'colm-model-2'; supported: colm-model-1"),
        ('{"format": "colm-model-1"}', "digests.config.json: nothing; supported"),
        ('{"format": "colm-model-1", "digests": []}', r"digests: \[\]; supported"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text, "utf-8")
    for read in (*READERS, kv_identity):
        with pytest.raises(CheckpointError, match=rf"manifest\.json: {message}"):
            read(folder)


def test_a_manifest_lists_every_chain_and_no_other(folder: Path) -> None:
    edit_manifest(folder, **{"chain_2.safetensors": None})
    for read in (*READERS, kv_identity):
        with pytest.raises(CheckpointError, match=r"manifest\.json: digests\.chain-2\.safetensors"):
            read(folder)
    edit_manifest(folder, **{"chain_2.safetensors": "0" * 32, "chain_4.safetensors": "0" * 32})
    for read in (*READERS, kv_identity):
        with pytest.raises(CheckpointError, match=r"it has one of chain-4\.safetensors, which is"):
            read(folder)
    edit_manifest(folder, **{"chain_2.safetensors": 7, "chain_4.safetensors": None})
    with pytest.raises(CheckpointError, match=r"digests\.chain-2\.safetensors: 7; supported"):
        load_model(folder)


def test_a_chain_too_many_is_named(folder: Path) -> None:
    shutil.copy(chain_path(folder, 3), chain_path(folder, 12))
    for read in (*READERS, kv_identity):
        with pytest.raises(CheckpointError, match=r"chain-12\.safetensors: no file of this model"):
            read(folder)
    save_model(retrained(2.0), folder)
    assert saves_in(folder) == [2.0]
    assert not chain_path(folder, 12).exists()


@pytest.mark.parametrize("was_sealed", [True, False])
def test_a_save_during_a_load_is_loaded_whole_or_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, was_sealed: bool
) -> None:
    saved, number, outcomes = True, 0, []
    while saved:
        number += 1
        save_model(retrained(1.0), folder)
        if not was_sealed:
            unseal(folder)
        with monkeypatch.context() as patched:
            was_saved = before_open(patched, number, lambda: save_model(retrained(2.0), folder))
            outcomes.append(saves_or_refusal(folder))
            saved = was_saved()
        if saved:
            assert saves_in(folder) == [2.0]
    assert number > 6
    assert [1.0] in outcomes
    for outcome in outcomes:
        assert outcome in ([1.0], [2.0]) or re.search(REPLACED, str(outcome))


def test_loads_beside_a_process_that_saves_are_whole_or_refused(folder: Path) -> None:
    with start(_SAVE_IN_TURNS, folder, 100) as process:
        while process.poll() is None:
            outcome = saves_or_refusal(folder)
            assert outcome in ([1.0], [2.0]) or re.search(REPLACED, str(outcome))
    assert process.returncode == 0
    assert saves_in(folder) == [2.0]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_save_killed_anywhere_leaves_the_old_model_or_the_new(
    tmp_path: Path, is_there: bool
) -> None:
    with start(_KILL_SAVES, tmp_path, json.dumps(is_there)) as process:
        output = process.communicate(timeout=280)[0]
    assert process.returncode == 0
    runs = json.loads(output)
    assert len(runs) > 15
    assert [was_killed for was_killed, _, _ in runs] == [True] * (len(runs) - 1) + [False]
    kinds = [kind for kind, _ in groupby(outcome for _, outcome, _ in runs)]
    if is_there:
        assert kinds == [[1.0], [2.0]]
        assert all("tokenizer.json" in names for _, _, names in runs)
        assert runs[-2][1] == [2.0], "killed while the old one went away"
    else:
        assert kinds == [f"{tmp_path}/model/config.json: no such file", [2.0]]
        assert not any(names for _, outcome, names in runs if outcome != [2.0])
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what deaths left stays"


def test_a_save_is_on_the_disk_before_it_takes_the_old_one_s_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | None] = []
    fsync, exchange = os.fsync, files._exchange

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_exchange(one: Path, other: Path) -> bool:
        events.append(None)
        return exchange(one, other)

    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(files, "_exchange", note_exchange)
    save_model(retrained(2.0), folder)
    before, after = events[: events.index(None)], events[events.index(None) + 1 :]
    staging = before[-1]
    assert staging is not None
    assert {staging / path.name for path in folder.iterdir()} <= set(before)
    assert staging.parent == folder.parent
    assert after == [folder.parent]
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert times["manifest.json"] == max(times.values())


def test_files_folders_and_links_beside_a_model_stay(folder: Path, later: Path) -> None:
    (folder / "plots" / "old").mkdir(parents=True)
    (folder / "plots" / "old" / "loss.svg").write_text("<svg/>")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "dangling").symlink_to("nowhere")
    folder.chmod(0o750)
    others = {"plots", "tokenizer.json", "link", "dangling"}
    save_model(retrained(2.0), folder)
    assert saves_in(folder) == [2.0]
    assert {path.name for path in folder.iterdir()} == {p.name for p in later.iterdir()} | others
    assert (folder / "plots" / "old" / "loss.svg").read_text() == "<svg/>"
    assert (folder / "tokenizer.json").stat().st_nlink == 1
    assert (folder / "link").readlink() == Path("tokenizer.json")
    assert (folder / "dangling").readlink() == Path("nowhere")
    assert folder.stat().st_mode & 0o777 == 0o750


def test_files_that_cannot_have_two_names_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").write_text("{}")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    save_model(retrained(2.0), folder)
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_a_save_through_a_link_replaces_what_it_leads_to(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to("model")
    save_model(retrained(2.0), link)
    assert link.readlink() == Path("model")
    assert saves_in(folder) == saves_in(link) == [2.0]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["link", "model"]


def test_a_full_disk_leaves_the_old_save(folder: Path) -> None:
    with full_disk(1000), pytest.raises(WriteFailed, match="cannot be written"):
        save_model(retrained(2.0), folder)
    assert saves_in(folder) == [1.0]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_without_a_manifest_is_read_with_a_warning_until_it_is_sealed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sealed = (folder / "manifest.json").read_bytes()
    unseal(folder)
    identity = kv_identity(folder)
    for read in READERS:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read(folder)
        assert [r.getMessage() for r in caplog.records] == [
            f"{folder} has no manifest.json, so a mix of chains of two saves cannot be told: "
            f"`colm seal {folder}` checks its files and writes one"
        ]
    monkeypatch.setattr(sys, "argv", ["colm", "seal", str(folder)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert (folder / "manifest.json").read_bytes() == sealed
    caplog.clear()
    assert kv_identity(folder) == identity
    assert not caplog.records


def test_what_is_damaged_is_not_sealed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unseal(folder)
    with chain_path(folder, 3).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    monkeypatch.setattr(sys, "argv", ["colm", "seal", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "chain-3.safetensors: damaged" in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_a_folder_that_was_replaced_is_told_from_what_was_opened(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    opened.check_unchanged()
    save_model(retrained(1.0), folder)
    opened.check_unchanged()
    save_model(retrained(2.0), folder)
    with pytest.raises(CheckpointError, match="model: replaced while it was being read"):
        opened.check_unchanged()
    for read in (lambda: load_model(opened), lambda: opened.chain(2).read_tensor("norm.weight")):
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors: of another save"):
            read()
