from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import make_model_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny three-level model."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")
