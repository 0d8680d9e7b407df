"""Text files and rows of JSONL and parquet files as documents, split into training and held-out.

The default corpus is the running interpreter's standard library: it is on every machine that can
run this program, so a run is reproducible without a download.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from colm_serve.errors import InvalidArgument
from colm_serve.training.rows import ROW_SUFFIXES, read_rows

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """A text and where it is from: the file's path below the corpus folder, with forward slashes,
    and `:row` in a JSONL or parquet file.
    """

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their files' paths and, in a file, of its rows."""

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
    folder: Path | None,
    heldout_fraction: float,
    exclude: Sequence[str] = (),
    text_field: str = "text",
) -> Corpus:
    """Read every document of `folder`, or the standard library's `*.py` files when it is None.

    Args:
        folder: text files anywhere below it, a document each, and `.jsonl` and `.parquet` files,
            a document each row; hidden files and texts that are not UTF-8 are left out.
        heldout_fraction: share of the documents that training never sees; see `is_heldout`.
        exclude: shell patterns of relative paths to leave out; `*` also matches slashes.
        text_field: key or column of a row that holds its text.

    Raises:
        InvalidArgument: the folder is missing, or too small to have both splits, or has a row
            without text; see `read_rows`.
    """
    if folder is None:
        name = f"Python {platform.python_version()} standard library"
        root, pattern = Path(sysconfig.get_path("stdlib")), "*.py"
    else:
        name, root, pattern = folder.resolve().name, folder, "*"
    if not root.is_dir():
        raise InvalidArgument("data", str(folder), "a folder of text, JSONL or parquet files")
    documents = list(_documents(root, sorted(root.rglob(pattern)), exclude, text_field))
    train = tuple(d for d in documents if not is_heldout(d.path, heldout_fraction))
    heldout = tuple(d for d in documents if is_heldout(d.path, heldout_fraction))
    if not train or not heldout:
        raise InvalidArgument(
            "data",
            str(root),
            "a folder with documents for training and for the held-out split; this one gives "
            f"{len(train)} and {len(heldout)}",
        )
    return Corpus(name, train, heldout)


def is_heldout(key: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its path, or another text that tells it from
    others, so every run and machine agree.
    """
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _documents(
    root: Path, paths: Iterable[Path], exclude: Sequence[str], text_field: str
) -> Iterator[Document]:
    for path in paths:
        relative = path.relative_to(root)
        name = relative.as_posix()
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not _SKIPPED_FOLDERS.isdisjoint(relative.parts) or not path.is_file():
            continue
        if any(fnmatch(name, pattern) for pattern in exclude):
            continue
        if path.suffix in ROW_SUFFIXES:
            rows = read_rows(path, text_field)
            found = [Document(f"{name}:{number}", text) for number, text in rows]
        else:
            found = _text_file(name, path)
        yield from (document for document in found if document.text.strip())


def _text_file(name: str, path: Path) -> list[Document]:
    try:
        return [Document(name, path.read_text("utf-8"))]
    except UnicodeDecodeError:
        return []
