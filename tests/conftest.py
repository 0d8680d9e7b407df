"""How all tests run: kernels in Triton's interpreter, files and Ray's tests each in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

SYSTEM = Path(__file__).parent / "system"


class OneClusterAtATime(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests run in one process, in their order; so do all that start Ray.

    A scheduler of our own, as `--dist loadgroup` writes a test's group into its id, which pytest
    has not read since 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "ray" if file.startswith("tests/system/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on Ray first: they are the longest that one process must run."""
    items.sort(key=lambda item: not item.path.is_relative_to(SYSTEM))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneClusterAtATime:
    """Of pytest-xdist."""
    return OneClusterAtATime(config, log)
