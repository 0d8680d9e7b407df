"""Checkpoints that are not whole: what is wrong is named, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from colm_serve.convert.export_llama import export_llama
from colm_serve.convert.hf_config import read_hf_config
from colm_serve.convert.import_llama import import_llama
from colm_serve.errors import CheckpointError, InvalidArgument
from colm_serve.model.checkpoint import load_model, save_model
from colm_serve.model.config import ColmConfig
from tests.convert.llamas import SIZES, read_tensors
from tests.model.models import unseal
from tests.model.retrained import before_open

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
Edit = Callable[[Path], object]


@pytest.fixture(scope="session")
def sharded(llama_of: Callable[[str], Path]) -> Path:
    return llama_of("bf16 shards")


@pytest.fixture
def llama(llama_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file, to damage."""
    return shutil.copytree(llama_of("grouped"), tmp_path / "llama")


def refusal(llama: Path) -> str:
    """Why the folder cannot be imported; nothing may be left where it was to go."""
    with TemporaryDirectory() as empty:
        with pytest.raises(CheckpointError) as caught:
            import_llama(llama, Path(empty) / "out")
        assert not list(Path(empty).iterdir())
    return str(caught.value)


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Rewrite a file with tensors changed or (None) left out."""
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items()
               if tensor is not None}  # fmt: skip
    save_file(tensors, path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, f"{{file}}: tensor {Q_PROJ} is missing, expected with shape (64, 64)"),
        ({Q_PROJ: torch.zeros(48, 64)}, f"{{file}}: tensor {Q_PROJ} has shape (48, 64), expected "
         "(64, 64) by config.json"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}, "{file}: tensor "
         "model.layers.1.self_attn.q_proj.bias of shape (64,) has no place in a LLaMA"),
        ({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}, f"{{file}}: tensor {Q_PROJ} is stored as "
         "I8; expected one of F32, F16, BF16"),
    ],
    ids=["missing", "shape", "bias", "dtype"],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(
    llama: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    edit_tensors(llama / "model.safetensors", **changes)
    expected = message.format(file=llama / "model.safetensors")
    assert refusal(llama).startswith(expected)


def test_one_more_layer_than_config_json_has(llama: Path) -> None:
    edit_json(llama / "config.json", num_hidden_layers=2)
    name = "model.layers.2.input_layernorm.weight"
    assert f"tensor {name} of shape (64,) has no place" in refusal(llama)


def test_a_shard_is_missing(sharded: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(sharded, tmp_path / "llama")
    shard = sorted(llama.glob("model-*"))[1]
    shard.unlink()
    assert refusal(llama) == f"{shard}: no such file; model.safetensors.index.json names it"


def test_a_shard_lacks_what_the_index_says(sharded: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(sharded, tmp_path / "llama")
    index = json.loads((llama / "model.safetensors.index.json").read_text("utf-8"))
    shard = llama / index["weight_map"][Q_PROJ]
    edit_tensors(shard, **{Q_PROJ: None})
    assert refusal(llama).startswith(f"{shard}: tensor {Q_PROJ} is missing; ")


def test_an_index_reaches_no_other_folder(sharded: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(sharded, tmp_path / "llama")
    index = llama / "model.safetensors.index.json"
    edit_json(index, weight_map={HEAD: "../secret.safetensors"})
    expected = f"{index}: weight_map: tensor {HEAD} is in '../secret.safetensors'"
    assert refusal(llama).startswith(expected)


def test_pickled_weights_are_not_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(llama)


def test_a_tied_head_must_be_the_embedding(llama_of: Callable[[str], Path], tmp_path: Path) -> None:
    llama = shutil.copytree(llama_of("tied"), tmp_path / "llama")
    embedding = read_tensors(llama)["model.embed_tokens.weight"]
    edit_tensors(llama / "model.safetensors", **{HEAD: embedding.clone()})
    import_llama(llama, tmp_path / "tied")
    edit_tensors(llama / "model.safetensors", **{HEAD: embedding + 1})
    assert "tie_word_embeddings: true" in refusal(llama)


def test_frequencies_that_the_config_gives_are_left_out(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(llama / "model.safetensors", **{name: torch.ones(4)})
    import_llama(llama, tmp_path / "colm")
    assert len(read_tensors(tmp_path / "colm")) == len(read_tensors(llama)) - 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not "
         "JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda f: edit_json(f / "config.json", vocab_size=319), "tokenizer.json: of another "
         "model: it has token id 319, and config.json's vocab_size is 319"),
    ],
    ids=["no tokenizer", "bad tokenizer", "settings", "no config", "bad config", "vocabulary"],
)  # fmt: skip
def test_a_file_beside_the_weights(llama: Path, damage: Edit, message: str) -> None:
    damage(llama)
    assert refusal(llama).startswith(f"{llama}/{message}")


def test_nothing_is_replaced(llama: Path, tmp_path: Path) -> None:
    import_llama(llama, tmp_path / "colm")
    for convert, source in ((import_llama, llama), (export_llama, tmp_path / "colm")):
        with pytest.raises(InvalidArgument, match=r"out: .* is not allowed"):
            convert(source, tmp_path / "colm")


def test_a_damaged_chain_is_not_exported(
    imported_of: Callable[[str], Path], tmp_path: Path
) -> None:
    colm = shutil.copytree(imported_of("grouped"), tmp_path / "colm")
    path = colm / "chain-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{path}: damaged"):
        export_llama(colm, tmp_path / "llama")
    path.write_bytes(content)
    unseal(colm)
    edit_json(colm / "config.json", d_ff=80)
    with pytest.raises(CheckpointError, match=r"tensor blocks\.0\.ffn\.w1\.weight has shape"):
        export_llama(colm, tmp_path / "llama")
    assert sorted(tmp_path.iterdir()) == [colm]


def test_a_model_that_is_replaced_meanwhile_is_not_exported(
    imported_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its chain is opened, at moments from the first to the last."""
    colm, out, other = tmp_path / "colm", tmp_path / "llama", load_model(imported_of("grouped"))
    for parameter in other.model.parameters():
        parameter.add_(1)
    export_llama(imported_of("grouped"), tmp_path / "expected")
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    replaced, number, num_refused = True, 1, 0
    while replaced:
        shutil.rmtree(colm, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(imported_of("grouped"), colm)
        with monkeypatch.context() as patched:
            was_called = before_open(patched, number, lambda: save_model(other.model, colm))
            with suppress(CheckpointError):
                export_llama(colm, out)
            replaced = was_called()
        if out.exists():
            assert (out / "model.safetensors").read_bytes() == expected
        else:
            num_refused += replaced
        number += 10
    assert num_refused > 5
    assert out.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_conversion_that_ends_early_leaves_nothing(
    llama: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(num_written: int, num_total: int) -> None:
        if num_written > num_total / 2:
            raise error

    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        import_llama(llama, tmp_path / "colm", stop)
    assert sorted(tmp_path.iterdir()) == before
    import_llama(llama, tmp_path / "colm")
    with pytest.raises(error):
        export_llama(tmp_path / "colm", tmp_path / "back", stop)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "colm"])


@contextmanager
def damaged(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> Iterator[Path]:
    """A folder like the given one, but for what is done to one file's content."""
    with TemporaryDirectory() as parent:
        copy = Path(parent) / "llama"
        copy.mkdir()
        for path in folder.iterdir():
            if path.name == name:
                (copy / name).write_bytes(damage(path.read_bytes()))
            else:
                (copy / path.name).symlink_to(path)
        yield copy


def is_imported(llama: Path) -> bool:
    """Whether the folder can be imported; if not, it is named and nothing else is there."""
    out = llama.parent / "out"
    try:
        import_llama(llama, out)
    except CheckpointError as error:
        said = str(error)
    else:
        return True
    assert said.startswith(str(llama))
    assert sorted(llama.parent.iterdir()) == [llama]
    return False


@settings(max_examples=40)
@given(data=st.data())
def test_a_file_cut_short_is_refused(sharded: Path, data: st.DataObject) -> None:
    names = [path.name for path in sorted(sharded.iterdir()) if path.suffix != ".jinja"]
    name = data.draw(st.sampled_from(names))

    def cut(content: bytes) -> bytes:
        return content[: data.draw(st.integers(0, len(content.rstrip()) - 1))]

    with damaged(sharded, name, cut) as llama:
        assert not is_imported(llama)


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_header_is_refused_unless_it_says_the_same(
    sharded: Path, data: st.DataObject
) -> None:
    shard = data.draw(st.sampled_from(sorted(path.name for path in sharded.glob("*.safetensors"))))

    def flip(content: bytes) -> bytes:
        header_end = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(st.integers(0, header_end - 1))
        flipped = content[place] ^ data.draw(st.integers(1, 255))
        return content[:place] + bytes([flipped]) + content[place + 1 :]

    with damaged(sharded, shard, flip) as llama:
        if is_imported(llama):
            assert load_file(llama / shard).keys() == load_file(sharded / shard).keys()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=60)
@given(key=st.sampled_from(sorted({*SIZES, "rope_parameters", "head_dim"})), value=_JSON)
def test_any_value_in_config_json_is_refused_or_read(sharded: Path, key: str, value: Any) -> None:
    def edit(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), key: value}).encode()

    with damaged(sharded, "config.json", edit) as llama:
        if is_imported(llama):
            assert ColmConfig.load(llama.parent / "out") == read_hf_config(llama)
