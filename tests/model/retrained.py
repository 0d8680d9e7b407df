"""Saves of one model trained on: its first chain stays, and the chains above it tell the save."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_serve import files
from colm_serve.errors import CheckpointError
from colm_serve.model import chain_file
from colm_serve.model.checkpoint import chain_tensors, load_model, save_model
from colm_serve.model.transformer import ColmModel
from tests.model.models import SMALL, random_model

#: What the system is asked for while a folder is written; the files are told by their paths.
_STEPS = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


@torch.no_grad()
def retrained(value: float) -> ColmModel:
    """Every weight of the chains above the first is `value`."""
    model = random_model(SMALL)
    for chain in (2, 3):
        for _, parameter in chain_tensors(model, chain):
            parameter.fill_(value)
    return model


def saves_in(folder: Path) -> list[float]:
    """The saves that a loaded folder's chains are of, which should be one.

    Raises:
        CheckpointError: it is not loaded.
    """
    model = load_model(folder).model
    parameters = (p for chain in (2, 3) for _, p in chain_tensors(model, chain))
    return sorted({float(value) for parameter in parameters for value in parameter.unique()})


def saves_or_refusal(folder: Path) -> list[float] | str:
    """The same, or why the folder is not loaded."""
    try:
        return saves_in(folder)
    except CheckpointError as error:
        return str(error)


def before_open(
    monkeypatch: pytest.MonkeyPatch, number: int, call: Callable[[], object]
) -> Callable[[], bool]:
    """Call once, the so-manieth time that a chain's file is about to be opened, by its path or by
    what safetensors opens it again with; returns if it was."""
    num_opened, called = 0, False

    def count_first(module: Any, name: str) -> None:
        real = getattr(module, name)

        def count_and_open(*arguments: Any, **options: Any) -> Any:
            nonlocal num_opened, called
            num_opened += 1
            if num_opened >= number and not called:
                called = True
                call()
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, count_and_open)

    count_first(chain_file, "_opened")
    count_first(chain_file, "safe_open")
    count_first(torch.UntypedStorage, "from_file")
    return lambda: called


def killed_saves(root: Path, is_there: bool) -> Iterator[tuple[bool, list[float] | str, list[str]]]:
    """A save killed before its first step, then one before its second, and so on to its end.

    Yields:
        Whether it was killed, which saves the folder loads as, or why it does not, and its files.
    """
    folder, old, new = root / "model", retrained(1.0), retrained(2.0)
    was_killed, step = True, 0
    while was_killed:
        shutil.rmtree(folder, ignore_errors=True)
        if is_there:
            save_model(old, folder)
            (folder / "tokenizer.json").write_text("{}")
        child = os.fork()
        if child == 0:
            _die_at(step, root)
            save_model(new, folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        was_killed = os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL)
        yield was_killed, saves_or_refusal(folder), sorted(p.name for p in folder.glob("*"))
        step += 1


def _die_at(step: int, root: Path) -> None:
    """Kill this process once it has taken so many steps of writing."""
    num_taken = 0

    def take() -> None:
        nonlocal num_taken
        if num_taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        num_taken += 1

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STEPS or (event == "open" and str(root) in str(arguments[0])):
            take()

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            take()
            result = real(*arguments)
            take()
            return result

        return call

    sys.addaudithook(watch)
    for module, name in ((os, "fsync"), (chain_file, "save_file"), (files, "_exchange")):
        setattr(module, name, around(getattr(module, name)))
