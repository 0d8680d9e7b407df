"""Text files as documents, split by file into training and held-out text.

The default corpus is the running interpreter's standard library: it is on every machine that can
run this program, so a run is reproducible without a download.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from colm_serve.errors import InvalidArgument

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One file: its path below the corpus folder, with forward slashes, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their paths."""

    name: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of every path and text: two runs on the same data agree on it."""
        state = hashlib.sha256()
        for document in (*self.train, *self.heldout):
            state.update(f"{document.path}\0{document.text}\0".encode())
        return state.hexdigest()


def read_corpus(
    folder: Path | None, heldout_fraction: float, exclude: Sequence[str] = ()
) -> Corpus:
    """Read every document of `folder`, or the standard library's `*.py` files when it is None.

    Args:
        folder: text files anywhere below it; files that are not UTF-8 and hidden files are
            left out.
        heldout_fraction: share of the files that training never sees; see `is_heldout`.
        exclude: shell patterns of relative paths to leave out; `*` also matches slashes.

    Raises:
        InvalidArgument: the folder is missing, or too small to have both splits.
    """
    if folder is None:
        name = f"Python {platform.python_version()} standard library"
        root, pattern = Path(sysconfig.get_path("stdlib")), "*.py"
    else:
        name, root, pattern = folder.resolve().name, folder, "*"
    if not root.is_dir():
        raise InvalidArgument("data", str(folder), "a folder of text files")
    documents = list(_documents(root, sorted(root.rglob(pattern)), exclude))
    train = tuple(d for d in documents if not is_heldout(d.path, heldout_fraction))
    heldout = tuple(d for d in documents if is_heldout(d.path, heldout_fraction))
    if not train or not heldout:
        raise InvalidArgument(
            "data",
            str(root),
            "a folder with files for training and for the held-out split; this one gives "
            f"{len(train)} and {len(heldout)}",
        )
    return Corpus(name, train, heldout)


def is_heldout(path: str, fraction: float) -> bool:
    """Whether a file is held out: a function of its path alone, so every run and machine agree."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _documents(root: Path, paths: Iterable[Path], exclude: Sequence[str]) -> Iterable[Document]:
    for path in paths:
        relative = path.relative_to(root)
        name = relative.as_posix()
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not _SKIPPED_FOLDERS.isdisjoint(relative.parts) or not path.is_file():
            continue
        if any(fnmatch(name, pattern) for pattern in exclude):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name, text)
