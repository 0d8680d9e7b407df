from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from colm_serve.errors import InvalidArgument
from colm_serve.training.corpus import is_heldout, read_corpus


def test_split_is_disjoint_whole_and_the_same_every_time(corpus_folder: Path) -> None:
    first, second = read_corpus(corpus_folder, 0.2), read_corpus(corpus_folder, 0.2)
    train, heldout = ({d.path for d in split} for split in (first.train, first.heldout))
    assert first == second
    assert first.fingerprint == second.fingerprint
    assert train.isdisjoint(heldout)
    assert len(train | heldout) == 40


def test_split_of_a_file_does_not_depend_on_the_others(corpus_folder: Path) -> None:
    before = {d.path for d in read_corpus(corpus_folder, 0.2).heldout}
    (corpus_folder / "another.py").write_text("x = 1\n", "utf-8")
    after = {d.path for d in read_corpus(corpus_folder, 0.2).heldout}
    assert after - {"another.py"} == before


def test_split_of_known_paths_never_moves() -> None:
    """A change here would put training text into published held-out figures."""
    paths = [f"{name}.py" for name in ("abc", "ast", "json/decoder", "test/test_re", "typing")]
    assert [is_heldout(path, 0.3) for path in paths] == [False, False, True, True, False]
    share = sum(is_heldout(f"{i}.py", 0.3) for i in range(2000)) / 2000
    assert 0.27 < share < 0.33


def test_standard_library_leaves_out_what_is_not_it() -> None:
    corpus = read_corpus(None, 0.03, ["encodings/*"])
    paths = [d.path for d in (*corpus.train, *corpus.heldout)]
    assert "json/decoder.py" in paths
    assert not [p for p in paths if "site-packages" in p or p.startswith("encodings/")]


def test_undecodable_hidden_and_empty_files_are_left_out(corpus_folder: Path) -> None:
    (corpus_folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (corpus_folder / ".hidden.py").write_text("x = 1\n", "utf-8")
    (corpus_folder / "empty.py").write_text("\n", "utf-8")
    corpus = read_corpus(corpus_folder, 0.2)
    assert len(corpus.train) + len(corpus.heldout) == 40


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)]
)
def test_each_row_is_a_document(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[dict[str, object]]], None]
) -> None:
    rows: list[dict[str, object]] = [{"id": i, "body": f"text {i} – naïve\n"} for i in range(40)]
    write(tmp_path / f"shard{suffix}", [*rows, {"id": 40, "body": " "}])
    corpus = read_corpus(tmp_path, 0.2, text_field="body")
    documents = {d.path: d.text for d in (*corpus.train, *corpus.heldout)}
    assert documents == {f"shard{suffix}:{i + 1}": row["body"] for i, row in enumerate(rows)}
    assert 1 <= len(corpus.heldout) < 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', r"a.jsonl:2' is not .* a line of JSON"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl:2' is not .* a line with a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1' .* a text in its field text; here it is 3"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1' .* field text; here are \['body'\]"),
        ("a.parquet", b"PAR1", "a.parquet' is not allowed; allowed: a whole parquet file"),
    ],
)
def test_an_error_names_file_row_and_field(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        read_corpus(tmp_path, 0.2)


def test_a_parquet_file_without_the_column_or_with_an_empty_place_is_refused(
    tmp_path: Path,
) -> None:
    write_parquet(tmp_path / "a.parquet", [{"body": "x"}, {"body": None}])
    with pytest.raises(InvalidArgument, match=r"a column text; here are \['body'\]"):
        read_corpus(tmp_path, 0.2)
    with pytest.raises(InvalidArgument, match=r"a.parquet:2' .* field body; here it is None"):
        read_corpus(tmp_path, 0.2, text_field="body")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="data: "):
        read_corpus(tmp_path / name, 0.2)
