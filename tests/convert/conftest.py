from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from colm_serve.convert.import_llama import import_llama
from tests.convert.llamas import write_llama


@pytest.fixture(scope="session")
def llama_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The LLaMA folder of a variant; do not change it."""

    @cache
    def make(variant: str) -> Path:
        return write_llama(tmp_path_factory.mktemp("llamas") / "llama", variant)

    return make


@pytest.fixture(scope="session")
def imported_of(
    llama_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same imported; do not change it."""

    @cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / "imported"
        import_llama(llama_of(variant), folder)
        return folder

    return make
