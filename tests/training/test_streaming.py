"""Training on a Hugging Face dataset that is never read as a whole, by the real library."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from colm_serve.errors import ColmError, InvalidArgument, InvalidConfig, Unavailable
from colm_serve.model.checkpoint import load_model
from colm_serve.training.config import TrainConfig
from colm_serve.training.report import Report, evaluate_folder
from colm_serve.training.snapshot import checkpoint_folders
from colm_serve.training.stream_config import StreamConfig
from colm_serve.training.streamed_corpus import StreamedCorpus
from colm_serve.training.trainer import train
from tests.training.conftest import NUM_FILES
from tests.training.runs import StopAfter, losses

MakeRecipe = Callable[..., TrainConfig]


@pytest.fixture
def streaming(recipe: MakeRecipe, rows_folder: Path) -> MakeRecipe:
    """The tiny recipe on that dataset, whose files last for some 10 steps each."""

    def make(**changes: object) -> TrainConfig:
        stream = StreamConfig(str(rows_folder), shuffle_sequences=7)
        return recipe(**{"stream": stream, "seq_len": 64, "eval_tokens": 200, **changes})

    return make


def corpus_of(folder: Path, **changes: object) -> StreamedCorpus:
    stream = StreamConfig.from_dict({"dataset": str(folder), **changes})
    return StreamedCorpus(stream, "text", 0.2)


def write_jsonl(folder: Path, texts: list[str]) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))


def write_parquet(folder: Path, texts: list[str]) -> None:
    rows = [{"text": text} for text in texts]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")


def write_text(folder: Path, texts: list[str]) -> None:
    (folder / "a.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_text])
def test_rows_are_documents_of_which_some_are_held_out(
    tmp_path: Path, write: Callable[[Path, list[str]], None]
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [f"line {i} – naïve" for i in range(100)]
    write(folder, [*texts, texts[0]])
    corpus = corpus_of(folder)
    training, heldout = list(corpus.training()), list(corpus.heldout())
    assert 5 < len(set(heldout)) < 40
    assert {*training, *heldout} == set(texts)
    assert set(training).isdisjoint(heldout), "a text that occurs again is in one split"


def test_a_stream_goes_on_where_its_state_was_taken(rows_folder: Path) -> None:
    first = corpus_of(rows_folder).share(2, 1)
    for _ in range(20):
        first.take(7)
        state = json.loads(json.dumps(first.state()))
        second = corpus_of(rows_folder).share(2, 1)
        second.go_on_from(state)
        assert second.take(30) == first.take(30)


def test_shares_are_the_corpus_and_passes_follow_each_other(rows_folder: Path) -> None:
    corpus = corpus_of(rows_folder)
    assert corpus.num_shards == NUM_FILES
    texts = list(corpus.training())
    whole = corpus.share(1, 0)
    assert whole.take(2 * len(texts)) == texts + texts
    shares = [corpus.share(NUM_FILES, i).take(len(texts)) for i in range(NUM_FILES)]
    assert {text for share in shares for text in share} == set(texts)
    assert sum(len(set(share)) for share in shares) == len(texts)


def test_no_more_is_read_than_is_asked_for(rows_folder: Path) -> None:
    (rows_folder / "train-1.jsonl").write_text("not JSON", "utf-8")
    documents = corpus_of(rows_folder).share(1, 0)
    assert len(documents.take(10)) == 10
    with pytest.raises(InvalidConfig, match="can be read"):
        documents.take(100)


def test_training_on_a_stream_lowers_the_heldout_loss(
    streaming: MakeRecipe, tmp_path: Path
) -> None:
    config = streaming(num_steps=30)
    result = train(config, tmp_path / "run", device="cpu")
    assert result.model_folder is not None
    report = Report.load(result.model_folder)
    assert report.num_tokens >= 200
    assert report.levels[-1].heldout_loss < np.log(config.model.vocab_size) - 1
    recipe = TrainConfig.load(result.model_folder / "train.yaml")
    assert recipe == config
    assert evaluate_folder(result.model_folder, recipe) == report
    assert not list((tmp_path / "run").glob("*.npy")), "the corpus is kept nowhere"


@pytest.mark.parametrize("num_files", [1, NUM_FILES])
def test_an_interrupted_run_goes_on_with_the_losses_of_the_uninterrupted(
    streaming: MakeRecipe, rows_folder: Path, tmp_path: Path, num_files: int
) -> None:
    """Within a block, across blocks, and into the dataset's second pass."""
    for file in range(num_files, NUM_FILES):
        (rows_folder / f"train-{file}.jsonl").unlink()
    config = streaming(num_steps=30, eval_interval_steps=1000, checkpoint_interval_s=1000)
    straight = train(config, tmp_path / "straight", device="cpu")
    for num_steps in (1, 4, 9, 10):
        train(config, tmp_path / "run", device="cpu", stop=StopAfter(num_steps))
    last = checkpoint_folders(tmp_path / "run")[-1]
    lanes = json.loads((last / "state.json").read_text("utf-8"))["batches"]
    assert len(lanes) == min(2, num_files)
    assert num_files > 1 or all(lane["documents"]["epoch"] > 0 for lane in lanes.values())
    resumed = train(config, tmp_path / "run", device="cpu")
    assert resumed.model_folder is not None
    assert straight.model_folder is not None
    assert len(losses(tmp_path / "run")) == 30
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    weights = load_model(resumed.model_folder).model
    expected = load_model(straight.model_folder).model
    for name, weight in weights.named_parameters():
        assert weight.equal(expected.get_parameter(name)), name


def test_another_dataset_in_its_place_is_refused(
    streaming: MakeRecipe, rows_folder: Path, tmp_path: Path
) -> None:
    train(streaming(), tmp_path / "run", device="cpu", stop=StopAfter(1))
    for path in rows_folder.iterdir():
        path.write_text(path.read_text("utf-8").replace("x * 1", "x * 7"), "utf-8")
    with pytest.raises(InvalidConfig, match=r"the corpus that .*run was started with"):
        train(streaming(), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "./missing"}, r"stream: '\./missing' .*a dataset that can be read \("),
        ({"split": "test"}, r"stream\.split: 'test' .*allowed: one of \['train'\]"),
        ({"config": "en"}, r"stream: '.*rows en' .*\(BuilderConfig 'en' not found\."),
        ({"data_files": ["b*.jsonl"]}, r"stream: '.*rows b\*\.jsonl' .*No .*data files found"),
    ],
)
def test_what_cannot_be_opened_is_told_in_a_line(
    rows_folder: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message) as caught:
        corpus_of(rows_folder, **changes)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(
    rows_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match=r"stream\.dataset: nobody/nothing: .*Hub") as caught:
        corpus_of(rows_folder, dataset="nobody/nothing")
    assert "\n" not in str(caught.value)


def test_the_extra_that_a_stream_needs_is_named(
    rows_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidConfig, match=r"stream: .*datasets is installed"):
        corpus_of(rows_folder)


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n', InvalidArgument, r"field text; here are \['body'\]"),
        ("a.jsonl", b'{"text": 3}\n', InvalidArgument, "in its field text; here it is 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', InvalidConfig, r"can be read \(.*JSON"),
        ("a.parquet", b"PAR1", InvalidConfig, r"can be read \(Parquet file size is 4 bytes"),
    ],
)
def test_rows_without_text_and_damaged_files_are_refused(
    tmp_path: Path, name: str, content: bytes, kind: type[ColmError], message: str
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        list(corpus_of(folder).training())
    assert "\n" not in str(caught.value)


def test_a_dataset_too_small_for_both_splits_is_refused(
    streaming: MakeRecipe, rows_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match="more than seq_len, 64, held-out tokens"):
        train(streaming(heldout_fraction=1e-9), tmp_path / "a", device="cpu")
    with pytest.raises(InvalidArgument, match="a dataset with texts to train on"):
        StreamedCorpus(StreamConfig(str(rows_folder)), "text", 1 - 1e-9).share(1, 0).take(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": {"split": "train"}}, r"stream: .*a mapping with dataset, of the keys"),
        ({"stream": {"dataset": "a", "shards": 2}}, "stream: .*a mapping with dataset"),
        ({"stream": {"dataset": 3}}, r"stream\.dataset: 3 .*a text"),
        ({"stream": {"dataset": "a", "split": ""}}, r"stream\.split: '' .*a name"),
        ({"stream": {"dataset": "a", "data_files": "b"}}, r"stream\.data_files: 'b' .*a list"),
        ({"stream": {"dataset": "a", "data_files": [1]}}, r"stream\.data_files: .*a list"),
        ({"stream": {"dataset": "a", "shuffle_sequences": 0}}, "shuffle_sequences: 0 .*a positive"),
        ({"stream": {"dataset": "a"}, "exclude": ["b"]}, r"exclude: .*empty where a stream has"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    recipe: MakeRecipe, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        TrainConfig.from_dict({**recipe().to_dict(), **changes})


def test_a_folder_beside_a_stream_is_refused(
    streaming: MakeRecipe, corpus_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match=r"stream: .*null where --data names a folder"):
        train(streaming(), tmp_path, data=corpus_folder, device="cpu")


def test_a_local_dataset_counts_from_the_recipe_s_folder(
    streaming: MakeRecipe, rows_folder: Path
) -> None:
    recipe = rows_folder.parent / "recipe.yaml"
    for dataset, expected in (("rows", str(rows_folder)), ("org/rows", "org/rows")):
        raw = {**streaming().to_dict(), "stream": {"dataset": dataset}}
        recipe.write_text(yaml.safe_dump(raw), "utf-8")
        assert TrainConfig.load(recipe).stream == StreamConfig(expected)
