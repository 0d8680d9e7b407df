"""A recipe's `stream`: which Hugging Face dataset to train on without keeping it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from colm_serve.errors import InvalidConfig


@dataclass(frozen=True)
class StreamConfig:
    """A dataset as `datasets.load_dataset` takes it, read in streaming mode.

    Attributes:
        dataset: its name on the hub, or a folder of data files.
        config: which of its configurations, if it has several.
        split: which part of it.
        revision: a branch, tag or commit on the hub; a commit cannot change under a run.
        data_files: patterns of the files to read, below the dataset; empty: the split's.
        shuffle_sequences: consecutive training sequences that are shuffled together; they are in
            memory, as token ids.

    Raises:
        InvalidConfig: a value that is not allowed, named with what is.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    shuffle_sequences: int = 256

    def __post_init__(self) -> None:
        for key in ("dataset", "split"):
            self._check(key, bool(getattr(self, key)), "a name")
        for key in ("dataset", "config", "split", "revision"):
            value, is_optional = getattr(self, key), key in ("config", "revision")
            allowed = "a text or null" if is_optional else "a text"
            self._check(key, isinstance(value, str) or (is_optional and value is None), allowed)
        are_texts = all(isinstance(pattern, str) for pattern in self.data_files)
        self._check("data_files", are_texts, "a list of patterns")
        is_count = type(self.shuffle_sequences) is int and self.shuffle_sequences > 0
        self._check("shuffle_sequences", is_count, "a positive integer")

    @property
    def name(self) -> str:
        """What training documents are said to be from."""
        local = Path(self.dataset)
        return local.name if local.is_absolute() else self.dataset

    @property
    def shown(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.dataset, self.config, *self.data_files)))

    def _check(self, key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidConfig(f"stream.{key}", getattr(self, key), allowed)

    @classmethod
    def from_dict(cls, raw: Any) -> StreamConfig:
        """Build from a recipe's `stream`."""
        known = [field.name for field in fields(cls)]
        if not isinstance(raw, dict) or not set(raw) <= set(known) or "dataset" not in raw:
            raise InvalidConfig("stream", raw, f"a mapping with dataset, of the keys {known}")
        patterns = raw.get("data_files") or ()
        if not isinstance(patterns, list | tuple):
            raise InvalidConfig("stream.data_files", patterns, "a list of patterns")
        return cls(**{**raw, "data_files": tuple(patterns)})

    @staticmethod
    def counted_from(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's mapping with a local dataset's folder, if it is one, found from `folder`."""
        local = folder / str(raw.get("dataset"))
        return {**raw, "dataset": str(local.resolve())} if local.is_dir() else dict(raw)
