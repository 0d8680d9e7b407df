"""The folder that a conversion writes: whole, or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from colm_serve.errors import InvalidArgument
from colm_serve.files import new_folder


@contextmanager
def new_model_folder(out: Path) -> Iterator[Path]:
    """A staging folder that becomes `out` when the block ends without an error.

    Raises:
        InvalidArgument: `out` is there already; nothing is replaced.
    """
    if out.exists():
        raise InvalidArgument("out", str(out), "a folder that is not there yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as staging:
        yield staging
