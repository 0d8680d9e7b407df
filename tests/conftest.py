"""How all tests run: kernels in Triton's interpreter, files and Ray's tests each in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

SYSTEM = Path(__file__).parent / "system"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process; so do all that start Ray, one cluster at a time."""
    for item in items:
        name = "ray" if item.path.is_relative_to(SYSTEM) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
