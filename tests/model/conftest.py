from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from colm_serve.model.checkpoint import save_model
from tests.model.models import VARIANTS, random_model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved random model of a variant; do not change it."""

    @cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / variant
        save_model(random_model(VARIANTS[variant]), folder)
        return folder

    return make
