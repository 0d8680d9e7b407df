"""Files that are there whole or not at all, whenever the process dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from colm_serve.errors import WriteFailed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteFailed, which names `path`, where the system does not let it be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteFailed(f"{path}: cannot be written: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old content or the new.

    Raises:
        WriteFailed: the old content is still there.
    """
    staging = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with staging.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A staging folder that becomes `path` when the block ends without an error.

    Raises:
        WriteFailed: nothing of it is left.
    """
    staging = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with writing(path):
            staging.mkdir()
            yield staging
            for file in (p for p in staging.rglob("*") if p.is_file()):
                _flush(file)
            if path.exists():
                shutil.rmtree(path)
            os.rename(staging, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
