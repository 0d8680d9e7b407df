"""Texts in the rows of JSONL and parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from colm_serve.errors import InvalidArgument

ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})


def read_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each row.

    Args:
        path: a file with one of ROW_SUFFIXES.
        text_field: the key or column that holds the text.

    Raises:
        InvalidArgument: the file cannot be read, or a row has no text there; the message names
            file, row and field.
    """
    rows = _parquet_rows(path, text_field) if path.suffix == ".parquet" else _jsonl_rows(path)
    for number, row in rows:
        yield number, row_text(row, text_field, f"{path}:{number}")


def row_text(row: Mapping[str, object], text_field: str, place: str) -> str:
    """A row's text; raises InvalidArgument, which names the place, if it has none."""
    text = row.get(text_field)
    if isinstance(text, str):
        return text
    found = f"here it is {text!r:.40}" if text_field in row else f"here are {sorted(row)}"
    raise InvalidArgument("data", place, f"a row with a text in its field {text_field}; {found}")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidArgument(
                    "data", f"{path}:{number}", f"a line of JSON ({error})"
                ) from error
            if not isinstance(row, dict):
                raise InvalidArgument("data", f"{path}:{number}", "a line with a JSON object")
            yield number, row


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidArgument(
            "data", str(path), "JSONL and text, or parquet once pyarrow is installed (extra: train)"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise InvalidArgument(
                    "data", str(path), f"a file with a column {text_field}; here are {names}"
                )
            batches: Iterable[list[dict[str, object]]] = (
                batch.to_pylist() for batch in file.iter_batches(columns=[text_field])
            )
            yield from enumerate((row for batch in batches for row in batch), 1)
    except pyarrow.ArrowException as error:
        raise InvalidArgument("data", str(path), f"a whole parquet file ({error})") from error
