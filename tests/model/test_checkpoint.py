"""Model folders: what is written is read back, and what is not whole is refused by its path."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from colm_serve.errors import CheckpointError, InvalidConfig, WriteFailed
from colm_serve.model import chain_file
from colm_serve.model.chain_file import chain_path, write_chain
from colm_serve.model.checkpoint import check_folder, load_model, save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.kv_identity import kv_identity
from colm_serve.model.transformer import ColmModel
from tests.full_disk import full_disk
from tests.model.models import SMALL, VARIANTS, random_model, read_chain, unseal

CHAIN_FILES = ["chain-1.safetensors", "chain-2.safetensors", "chain-3.safetensors"]
MODEL_FILES = [*CHAIN_FILES, "config.json", "manifest.json"]


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the small Air model, to damage."""
    return shutil.copytree(folder_of("air"), tmp_path / "model")


def _assert_same(found: ColmModel, expected: ColmModel) -> None:
    state = dict(found.named_parameters())
    assert state.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(state[name], parameter), name


def _edit_config(folder: Path, **changes: object) -> None:
    unseal(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def _edit_chain(folder: Path, chain: int, changes: Mapping[str, Tensor | None]) -> None:
    """Rewrite a chain's file, digest and all, with tensors changed or (None) left out."""
    unseal(folder)
    tensors, header = read_chain(folder, chain)
    edited = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    write_chain(folder, chain, edited, None if chain == 1 else header["base"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_is_read_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = random_model(VARIANTS[variant])
    save_model(model, tmp_path / "new" / "model")
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == MODEL_FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    loaded = load_model(tmp_path / "new" / "model").model
    _assert_same(loaded, model)
    assert loaded.config == model.config
    assert torch.equal(loaded.rotations, model.rotations)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("num_chains", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_k_chains_need_the_first_k_files_alone(
    folder_of: Callable[[str], Path], variant: str, num_chains: int, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(variant), tmp_path / "model")
    for chain in range(num_chains + 1, 4):
        chain_path(folder, chain).unlink()
    model = random_model(VARIANTS[variant])
    for with_head in (True, False):
        loaded = load_model(folder, num_chains, with_head=with_head).model
        assert loaded.num_chains == num_chains
        expected = dict(model.named_parameters())
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        assert (loaded.head is not None) == with_head
        assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_a_prefill_worker_s_load_opens_no_file_but_chain_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def watch(path: str, framework: str) -> Any:
        opened.append(Path(path).resolve().name)
        return real(path, framework=framework)

    real = safetensors.safe_open
    monkeypatch.setattr(chain_file, "safe_open", watch)
    load_model(folder, 1, with_head=False)
    assert set(opened) == {"chain-1.safetensors"}
    load_model(folder, 2)
    assert set(opened) == {"chain-1.safetensors", "chain-2.safetensors"}


def test_a_tied_head_is_stored_once_and_stays_the_embedding(
    folder_of: Callable[[str], Path],
) -> None:
    folder = folder_of("air-tied")
    assert "head.weight" not in read_chain(folder, 1)[0]
    model = load_model(folder).model
    assert model.head is not None
    for head, embedding in zip(model.head.weights, model.embedding.weights, strict=True):
        assert head is embedding


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(SMALL)
    with (
        full_disk(1000),
        pytest.raises(WriteFailed, match=r"chain-1\.safetensors: cannot be written.*too large"),
    ):
        save_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="file: cannot be written"):
        save_model(model, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("variant", ["air-interleave", "per_chain-interleave"])
def test_interleaved_query_heads_are_stored_next_to_those_of_their_kv_head(
    folder_of: Callable[[str], Path], variant: str
) -> None:
    folder, dim = folder_of(variant), SMALL.head_dim
    wq, wo = "blocks.1.attn.wq.weight", "blocks.1.attn.wo.weight"
    attn = load_model(folder).model.get_submodule("blocks.1.attn")
    in_memory_q, in_memory_o = attn.wq.weights[2], attn.wo.weights[2]  # type: ignore[union-attr,index]
    stored = read_chain(folder, 3)[0]
    # Chain 3 has 4 query heads and 2 kv heads: stored (kv, repeat), in memory (repeat, kv).
    q = stored[wq].view(2, 2, dim, -1).transpose(0, 1).reshape(4 * dim, -1)
    assert torch.equal(in_memory_q, q)
    # The output reads chains 1 and 2 (2 heads each) before its own.
    own = stored[wo][:, 4 * dim :].view(-1, 2, 2, dim).transpose(1, 2).reshape(-1, 4 * dim)
    assert torch.equal(in_memory_o[:, 4 * dim :], own)
    assert not torch.equal(in_memory_o, stored[wo])


def test_tiled_query_heads_are_stored_as_they_are(folder_of: Callable[[str], Path]) -> None:
    attn = load_model(folder_of("air")).model.get_submodule("blocks.1.attn")
    stored = read_chain(folder_of("air"), 3)[0]
    assert torch.equal(attn.wq.weights[2], stored["blocks.1.attn.wq.weight"])  # type: ignore[union-attr,index]


def test_a_model_may_be_stored_and_loaded_in_bf16(tmp_path: Path) -> None:
    model = random_model(SMALL)
    save_model(model, tmp_path / "fp32")
    save_model(model, tmp_path / "bf16", dtype=torch.bfloat16)
    sizes = [chain_path(tmp_path / name, 3).stat().st_size for name in ("fp32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]
    as_stored = load_model(tmp_path / "bf16", dtype=torch.bfloat16).model
    widened = load_model(tmp_path / "bf16").model
    for name, parameter in model.named_parameters():
        rounded = parameter.bfloat16()
        assert torch.equal(as_stored.get_parameter(name), rounded)
        assert torch.equal(widened.get_parameter(name), rounded.float())


@pytest.mark.parametrize("chain", [1, 2, 3])
def test_a_missing_chain_is_named(folder: Path, chain: int) -> None:
    chain_path(folder, chain).unlink()
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=rf"chain-{chain}\.safetensors: no such file"):
            read(folder)


@pytest.mark.parametrize("read", [load_model, check_folder, kv_identity])
def test_a_folder_that_is_not_there_is_named(read: Callable[[Path], object], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"elsewhere/config\.json: no such file"):
        read(folder / "elsewhere")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1], ids=str)
@pytest.mark.parametrize("chain", [1, 3])
def test_a_truncated_chain_is_named(folder: Path, chain: int, kept: float) -> None:
    path = chain_path(folder, chain)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=rf"chain-{chain}\.safetensors: truncated"):
            read(folder)


@pytest.mark.parametrize("chain", [1, 2, 3])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_one_wrong_bit_of_a_chain_s_payload_is_noticed(
    folder: Path, chain: int, place: float
) -> None:
    path = chain_path(folder, chain)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - 1 - start))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"chain-{chain}\.safetensors: damaged"):
        load_model(folder)


def test_a_wrong_byte_anywhere_in_a_chain_s_header_is_noticed(folder: Path) -> None:
    path = chain_path(folder, 2)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    text = whole[8:length].rstrip()
    for place in [*range(8), *range(8, 8 + len(text), 67)]:
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors"):
            load_model(folder)


def test_a_chain_of_another_model_of_the_same_shape_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    unseal(folder)
    save_model(random_model(SMALL, seed=1), tmp_path / "other")
    shutil.copy(chain_path(tmp_path / "other", 2), chain_path(folder, 2))
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors: .*another model"):
            read(folder)
    load_model(folder, 1)


def test_chain_1_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    unseal(folder)
    save_model(random_model(SMALL, seed=1), tmp_path / "other")
    shutil.copy(chain_path(tmp_path / "other", 1), chain_path(folder, 1))
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors: .*another model"):
            read(folder)


def test_one_chain_s_file_in_another_s_place_is_refused(folder: Path) -> None:
    shutil.copy(chain_path(folder, 3), chain_path(folder, 2))
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=r"chain-2\.safetensors: not chain 2 .*'3'"):
            read(folder)


@pytest.mark.parametrize("key", ["digest", "base"])
def test_a_key_that_a_header_lacks_is_named(folder: Path, key: str) -> None:
    tensors, header = read_chain(folder, 2)
    del header[key]
    save_file(tensors, chain_path(folder, 2), header)
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=rf"chain-2\.safetensors: .* lacks '{key}'"):
            read(folder)


def test_a_safetensors_file_without_our_header_is_refused(folder: Path) -> None:
    save_file(read_chain(folder, 1)[0], chain_path(folder, 1))
    with pytest.raises(CheckpointError, match=r"chain-1\.safetensors: not chain 1 of a CoLM"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    name = "blocks.2.ffn.w1.weight"
    shape = tuple(read_chain(folder, 2)[0][name].shape)
    _edit_chain(folder, 2, {name: torch.zeros(5, 7)})
    expected = f"chain-2.safetensors: tensor {name} has shape (5, 7), expected {shape}"
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            read(folder)


@pytest.mark.parametrize("chain", [1, 3])
def test_a_missing_tensor_is_named(folder: Path, chain: int) -> None:
    name = "blocks.0.attn_norm.weight"
    _edit_chain(folder, chain, {name: None})
    if chain == 1:
        for upper in (2, 3):
            write_chain(
                folder, upper, read_chain(folder, upper)[0], read_chain(folder, 1)[1]["base"]
            )
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=rf"chain-{chain}\.safetensors: tensor {name} is"):
            read(folder)


@pytest.mark.parametrize(
    ("changes", "chain", "tensor"),
    [
        ({"vocab_size": 98}, 1, "embedding.weight"),
        ({"d_ff": 64}, 1, "blocks.0.ffn.w1.weight"),
        ({"num_kv_heads": 1}, 1, "blocks.0.attn.wk.weight"),
        ({"head_dim": 4}, 1, "blocks.0.attn.wq.weight"),
        ({"num_layers": 4}, 1, "blocks.3.attn_norm.weight"),
        ({"head": "per_level"}, 2, "head.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_that_its_files_do_not_fit_is_refused_by_file_and_tensor(
    folder: Path, changes: dict[str, object], chain: int, tensor: str
) -> None:
    _edit_config(folder, **changes)
    expected = rf"chain-{chain}\.safetensors: tensor {re.escape(tensor)} "
    for read in (load_model, check_folder):
        with pytest.raises(CheckpointError, match=expected):
            read(folder)


def test_a_config_of_fewer_layers_than_its_files_is_refused_by_file_and_tensor(
    folder: Path,
) -> None:
    _edit_config(folder, num_layers=2)
    with pytest.raises(CheckpointError, match=r"chain-1\.safetensors: tensor blocks\.2\."):
        load_model(folder)


@pytest.mark.parametrize("read", [load_model, check_folder, kv_identity])
def test_a_config_of_another_model_type_is_refused(
    read: Callable[[Path], object], folder: Path
) -> None:
    _edit_config(folder, model_type="llama")
    with pytest.raises(CheckpointError, match=r"config\.json: model_type: 'llama' .*: colm"):
        read(folder)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{'vocab_size': 97}")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load_model(folder)


@pytest.mark.parametrize("num_chains", [0, 4])
def test_chains_that_the_model_lacks_are_refused(folder: Path, num_chains: int) -> None:
    with pytest.raises(InvalidConfig, match=f"num_chains: {num_chains} .* 1 to 3"):
        load_model(folder, num_chains)


def test_check_folder_returns_the_config_of_a_whole_folder(folder: Path) -> None:
    assert check_folder(folder) == SMALL


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("over_a_model", [False, True])
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_a_model: bool, fails_at: int
) -> None:
    old = random_model(SMALL)
    if over_a_model:
        save_model(old, tmp_path / "model")
        (tmp_path / "model" / "tokenizer.json").write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))

    def fail(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
        if path.name == f"chain-{fails_at}.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, header)

    monkeypatch.setattr(chain_file, "save_file", fail)
    with pytest.raises(WriteFailed, match="No space left"):
        save_model(random_model(SMALL, seed=1), tmp_path / "model")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if over_a_model:
        _assert_same(load_model(tmp_path / "model").model, old)


def test_a_save_replaces_the_model_and_keeps_other_files(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    new = random_model(SMALL, seed=1)
    save_model(new, folder)
    _assert_same(load_model(folder).model, new)
    assert sorted(path.name for path in folder.iterdir()) == [*MODEL_FILES, "tokenizer.json"]


def test_saving_twice_writes_the_same_digests(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder).model, tmp_path / "again")
    for chain in (1, 2, 3):
        assert read_chain(folder, chain)[1] == read_chain(tmp_path / "again", chain)[1]


def test_kv_identity_is_the_same_however_many_chains_are_loaded(folder: Path) -> None:
    identity = kv_identity(folder)
    assert load_model(folder, 1, with_head=False).kv_identity == identity
    assert load_model(folder, 2).kv_identity == identity
    assert load_model(folder).kv_identity == identity


def test_kv_identity_does_not_depend_on_upper_chains_and_their_heads(folder: Path) -> None:
    identity = kv_identity(folder)
    for chain in (2, 3):
        _edit_chain(
            folder, chain, {name: t + 1 for name, t in read_chain(folder, chain)[0].items()}
        )
    assert load_model(folder).kv_identity == identity
    for chain in (2, 3):
        chain_path(folder, chain).unlink()
    assert kv_identity(folder) == identity


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.2.attn.wv.weight"])
def test_kv_identity_depends_on_chain_1_s_content(folder: Path, name: str) -> None:
    identity = kv_identity(folder)
    tensor = read_chain(folder, 1)[0][name].clone()
    tensor[0, 0] += 1e-3
    _edit_chain(folder, 1, {name: tensor})
    assert kv_identity(folder) != identity


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 20000.0},
        {"rms_norm_eps": 1e-6},
        {"kv_repeat": "interleave"},
        {"ffn": "gelu"},
        {"d_ff": 256},
        {"num_heads": 16},
        {"rope_scaling": VARIANTS["air-rope_scaling"].to_dict()["rope_scaling"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kv_identity_depends_on_what_changes_keys_and_values(
    folder: Path, changes: dict[str, object]
) -> None:
    identity = kv_identity(folder)
    _edit_config(folder, **changes)
    assert kv_identity(folder) != identity


@pytest.mark.parametrize(
    "changes",
    [
        {"max_context": 32},
        {"head": "per_level"},
        {"bos_token_id": 1},
        {"eos_token_ids": [2]},
        {"chains": [2, 6]},
        {"chains": [2, 2], "d_model": 32, "d_ff": 64, "num_heads": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kv_identity_does_not_depend_on_what_does_not(
    folder: Path, changes: dict[str, object]
) -> None:
    identity = kv_identity(folder)
    _edit_config(folder, **changes)
    assert kv_identity(folder) == identity


def test_kv_identity_depends_on_all_sizes_where_chains_have_keys_of_their_own(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("per_chain"), tmp_path / "per_chain")
    identity = kv_identity(folder)
    _edit_config(folder, chains=[2, 6])
    assert kv_identity(folder) != identity


def test_a_config_that_differs_in_no_weight_still_tells_two_models_apart(tmp_path: Path) -> None:
    configs: list[ColmConfig] = [SMALL, replace(SMALL, rope_theta=500.0)]
    for config in configs:
        save_model(random_model(config), tmp_path / str(config.rope_theta))
    digests = [read_chain(tmp_path / str(c.rope_theta), 1)[1]["digest"] for c in configs]
    assert digests[0] == digests[1]
    identities = [kv_identity(tmp_path / str(c.rope_theta)) for c in configs]
    assert identities[0] != identities[1]
