"""Files and folders that are there whole or not at all, whenever a process or machine dies."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from colm_serve.errors import WriteFailed

#: How the name of a folder ends that is being written, and that is locked for as long.
_STAGING = ".colm-tmp"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
#: What a system or a file system says that cannot exchange two folders.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


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
            _flush(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A staging folder that becomes `path` when the block ends without an error.

    All of it is on the disk by then, and it takes the place of a folder that was there in one
    step: who dies or reads meanwhile has the one or the other. For that the system must be able
    to exchange folders, as Linux can on its own file systems. Elsewhere, on NFS say, `path` is not
    there between two renames; a death just then leaves the old one as `.<name>.colm-old`, which the
    next call puts back. What writers have left beside `path` who died goes away.

    Raises:
        WriteFailed: nothing of it is left, and what was there still is.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _take_up_what_a_death_left(path)
        is_there = path.exists()
        if is_there:
            _check_replaceable(path)
        with _staging_beside(path) as staging:
            yield staging
            _flush_tree(staging)
            if is_there:
                _replace_folder(path, staging)
            else:
                os.rename(staging, path)
            _flush(path.parent)


def _take_up_what_a_death_left(path: Path) -> None:
    old = _place_of_old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.rename(old, path)
    for left in path.parent.glob(f".*{_STAGING}"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left)


def _check_replaceable(path: Path) -> None:
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder")
    if path.is_mount():
        raise OSError(errno.EBUSY, "a mount point cannot be replaced; name a folder in it")


@contextmanager
def _staging_beside(path: Path) -> Iterator[Path]:
    """A folder of the caller's own; what has its name in the end goes away."""
    with ExitStack() as held:
        staging = _make_staging(path, held)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _make_staging(path: Path, held: ExitStack) -> Path:
    while True:
        staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_STAGING}")
        staging.mkdir()
        # Where a file system cannot lock folders, those of the dead cannot be told, and stay.
        with suppress(OSError):
            held.enter_context(_locked(staging, fcntl.LOCK_EX))
        # Not locked yet, it may have been taken for one of the dead.
        if staging.exists():
            return staging


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _replace_folder(path: Path, new: Path) -> None:
    """Put a new folder in the place of one; `new` may be the old one afterwards."""
    if _exchange(path, new):
        return
    old = _place_of_old(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))


def _place_of_old(path: Path) -> Path:
    return path.with_name(f".{path.name}.colm-old")


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in names):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        _flush(Path(place))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
