"""Expansion changes nothing that the model says, and nothing of what it was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colm_serve.convert.expand import expand, expanded_config
from colm_serve.engine.loading import load_for_serving, make_pool
from colm_serve.errors import CheckpointError, InvalidArgument
from colm_serve.model.chain_file import chain_path, write_chain
from colm_serve.model.checkpoint import load_model, save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.kv_identity import kv_identity
from tests.engine.paged import PAGE_SIZE, PAGES, decode, kv_of_whole_model, prefill
from tests.helpers import make_prompt
from tests.model.models import SMALL, random_model, read_chain, unseal
from tests.model.retrained import retrained

#: As an imported LLaMA: one chain, grouped query heads in LLaMA's order.
LLAMA = replace(SMALL, chains=(1,), kv_repeat="interleave")
PER_CHAIN = replace(SMALL, kv_sharing="per_chain", num_kv_heads=4)
BASES: dict[str, tuple[ColmConfig, tuple[int, ...], dict[str, Any]]] = {
    "one chain": (LLAMA, (2,), {}),
    "one chain by two": (LLAMA, (2, 6), {}),
    "one chain, tied": (replace(LLAMA, tie_embeddings=True), (4,), {}),
    "one chain to per_chain": (LLAMA, (4,), {"kv_sharing": "per_chain"}),
    "air": (SMALL, (2,), {}),
    "air, gelu": (replace(SMALL, ffn="gelu", kv_repeat="interleave"), (4, 2), {}),
    "per_chain": (PER_CHAIN, (2,), {}),
    "per_chain, tied": (replace(PER_CHAIN, tie_embeddings=True), (4,), {}),
}
LLAMA_3_2_1B = ColmConfig(
    vocab_size=128256, chains=(1,), d_model=2048, d_ff=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=131072, kv_repeat="interleave", tie_embeddings=True,
)  # fmt: skip
TINYLLAMA = replace(
    LLAMA_3_2_1B, vocab_size=32000, d_ff=5632, num_layers=22, num_kv_heads=4, tie_embeddings=False
)
#: Query heads, key/value heads and a hidden width that share few divisors.
LLAMA_3_2_3B = replace(LLAMA_3_2_1B, d_model=3072, num_layers=28, num_heads=24, head_dim=128)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_model(random_model(LLAMA), folder)
    return folder


@torch.no_grad()
def _logits(folder: Path, tokens: tuple[int, ...], level: int) -> Tensor:
    model = load_model(folder).model
    x_TD = model.hidden_states(torch.tensor([tokens]), [level])
    return model.logits(x_TD, [len(tokens)] * level)


def _served_text(folder: Path, prompt: tuple[int, ...], level: int) -> list[int]:
    """Greedy text from packed weights over paged keys and values."""
    loaded = load_for_serving(folder, num_chains=None, with_head=True)
    pool = make_pool(loaded, 32, PAGE_SIZE)
    table = pool.table(PAGES[0])
    prefill(loaded.model, pool, table, prompt[:-1], ())
    return decode(loaded.model, pool, table, prompt, [level] * 12)


@pytest.mark.parametrize("case", BASES)
def test_every_level_says_to_the_bit_what_the_base_said(case: str, tmp_path: Path) -> None:
    config, add_chains, options = BASES[case]
    base, grown = tmp_path / "base", tmp_path / "grown"
    save_model(random_model(config), base)
    expand(base, grown, add_chains, **options)
    tokens = make_prompt(40, config)
    num_levels = config.num_chains + len(add_chains)
    for level in range(1, num_levels + 1):
        level_before = min(level, config.num_chains)
        expected = _logits(base, tokens, level_before)
        assert expected.std() > 0.5, "logits too alike to compare"
        assert torch.equal(_logits(grown, tokens, level), expected)


@pytest.mark.parametrize("case", ["one chain by two", "one chain, tied", "air"])
def test_served_text_is_the_base_s_at_every_level(case: str, tmp_path: Path) -> None:
    config, add_chains, _ = BASES[case]
    base, grown = tmp_path / "base", tmp_path / "grown"
    save_model(random_model(config), base)
    expand(base, grown, add_chains)
    prompt = make_prompt(20, config)
    texts = {level: _served_text(base, prompt, level) for level in range(1, config.num_chains + 1)}
    for level in range(1, config.num_chains + len(add_chains) + 1):
        assert _served_text(grown, prompt, level) == texts[min(level, config.num_chains)]


def test_a_head_for_each_level_says_the_same_but_for_rounding(tmp_path: Path) -> None:
    config = replace(SMALL, head="per_level")
    base, grown = tmp_path / "base", tmp_path / "grown"
    save_model(random_model(config), base)
    expand(base, grown, [2, 4])
    tokens = make_prompt(40, config)
    for level in range(1, 4):
        assert torch.equal(_logits(grown, tokens, level), _logits(base, tokens, level))
    for level in (4, 5):
        torch.testing.assert_close(_logits(grown, tokens, level), _logits(base, tokens, 3))


def test_keys_and_values_are_the_base_s_and_named_so(base: Path, tmp_path: Path) -> None:
    for name, sizes in (("two", [2]), ("three", [4, 8])):
        expand(base, tmp_path / name, sizes)
        assert kv_identity(tmp_path / name) == kv_identity(base)
        tokens = make_prompt(30, LLAMA)
        expected = kv_of_whole_model(base, tokens, 1)
        for layer, found in kv_of_whole_model(tmp_path / name, tokens, 1 + len(sizes)).items():
            assert all(map(torch.equal, found, expected[layer]))
    expand(base, tmp_path / "per_chain", [4], kv_sharing="per_chain")
    assert kv_identity(tmp_path / "per_chain") != kv_identity(base)


def test_files_are_carried_along_byte_for_byte(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "eval.json").write_text("the old levels' losses")
    config = expand(base, tmp_path / "runs" / "grown", [2, 2])
    grown = tmp_path / "runs" / "grown"
    assert ColmConfig.load(grown) == config
    assert config.chains == (8, 2, 2)
    assert chain_path(grown, 1).read_bytes() == chain_path(base, 1).read_bytes()
    names = ["chain-1", "chain-2", "chain-3"]
    model = [*(f"{name}.safetensors" for name in names), "config.json", "manifest.json"]
    files = [*model, "tokenizer.json"]
    assert [path.name for path in sorted(grown.iterdir())] == files
    assert list(grown.parent.iterdir()) == [grown]


@pytest.mark.parametrize("number", range(1, 5))
def test_a_base_that_is_replaced_meanwhile_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before each of its files is copied: three chains, then the tokenizer."""
    base, copyfile, num_copied = tmp_path / "base", shutil.copyfile, 0
    save_model(retrained(1.0), base)
    (base / "tokenizer.json").write_text("{}")

    def replace_and_copy(source: Path, target: Path) -> None:
        nonlocal num_copied
        num_copied += 1
        if num_copied == number:
            save_model(retrained(2.0), base)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", replace_and_copy)
    with pytest.raises(CheckpointError, match=r"of another save|base: replaced while"):
        expand(base, tmp_path / "grown", [2])
    assert num_copied >= number
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_new_weights_follow_the_seed_and_are_stored_as_the_base_s(tmp_path: Path) -> None:
    save_model(random_model(LLAMA), tmp_path / "base", torch.bfloat16)
    chains = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        expand(tmp_path / "base", tmp_path / name, [2, 2], seed=seed)
        chains.append([read_chain(tmp_path / name, chain)[0] for chain in (2, 3)])
    name = "blocks.0.attn.wq.weight"
    (first, above), (again, _), (other, _) = chains
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], above[name][:, : first[name].shape[1]])
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(tensor.any() for key, tensor in first.items() if key != "head.weight")
    assert not first["head.weight"].any()


@pytest.mark.parametrize(
    ("base_config", "sizes"),
    [(LLAMA_3_2_1B, (2560, 10240, 40, 10)), (TINYLLAMA, (2560, 7040, 40, 5))],
    ids=["expansion-llama3.2-1B", "expansion-tinyllama"],
)
def test_the_paper_s_expanded_models_have_its_sizes(
    base_config: ColmConfig, sizes: tuple[int, ...]
) -> None:
    """Table 9."""
    config = expanded_config(base_config, [8], "per_chain")
    assert config.chains == (32, 8)
    assert (config.d_model, config.d_ff, config.num_heads, config.num_kv_heads) == sizes
    assert config.num_params(1) == base_config.num_params()


@pytest.mark.parametrize(
    ("config", "sizes", "kv_sharing", "expected"),
    [
        (LLAMA_3_2_1B, [12], "air", r"of 8 query heads \(8 for num_kv_heads\), such as 8, 16"),
        (LLAMA_3_2_1B, [20, 7], "per_chain", r"7.*multiples of 4 .*such as 4, 8, 12"),
        (LLAMA_3_2_3B, [8], "per_chain", r"of 3 query heads \(3 for d_ff, 3 for num_kv_h"),
        (LLAMA_3_2_3B, [40], "air", r"of 24 .*\(3 for d_ff, 8 for .*such as 24, 48, 72"),
        (SMALL, [0], None, r"0 is not allowed.*such as 2, 4, 6"),
        (SMALL, [-2], None, "such as 2, 4, 6"),
        (SMALL, [], None, "one or more sizes in query heads"),
        (SMALL, [2], "per_chain", "air, which the model's 3 chains were made for"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_with_those_that_would_work(
    config: ColmConfig, sizes: list[int], kv_sharing: Any, expected: str
) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        expanded_config(config, sizes, kv_sharing)


def test_what_cannot_be_read_or_written_leaves_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgument, match=r"out: .*there'.*a folder that is not there yet"):
        expand(base, tmp_path / "there", [2])
    unseal(base)
    tensors, _ = read_chain(base, 1)
    write_chain(base, 1, {name: t for name, t in tensors.items() if name != "norm.weight"})
    with pytest.raises(CheckpointError, match=r"chain-1\.safetensors: tensor norm\.weight is miss"):
        expand(base, tmp_path / "grown", [2])
    write_chain(base, 1, {**tensors, "norm.weight": tensors["norm.weight"][1:]})
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(63,\), expected \(64,\)"):
        expand(base, tmp_path / "grown", [2])
    write_chain(base, 1, tensors)
    with chain_path(base, 1).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"base/chain-1\.safetensors: damaged"):
        expand(base, tmp_path / "grown", [2])
    chain_path(base, 1).unlink()
    with pytest.raises(CheckpointError, match="chain 1 is missing"):
        expand(base, tmp_path / "grown", [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "there"]
