"""LLaMA -> CoLM -> LLaMA: the same logits on the way, and the same bytes in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_serve.convert.export_llama import export_llama
from colm_serve.errors import CheckpointError
from colm_serve.model.checkpoint import load_model, save_model
from tests.convert.llamas import SIZES, VARIANTS, open_llama, read_tensors
from tests.helpers import make_prompt
from tests.model.models import VARIANTS as COLMS
from tests.model.models import random_model

Folders = Callable[[str], Path]


@torch.no_grad()
def level_1_logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    model = load_model(folder).model
    return model.logits(model.hidden_states(torch.tensor([tokens]), [1]), [len(tokens)])


@torch.no_grad()
def llama_logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    logits: Tensor = open_llama(folder)(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_imported_model_has_the_llama_s_logits(
    llama_of: Folders, imported_of: Folders, variant: str
) -> None:
    tokens = make_prompt(70, replace(COLMS["air"], vocab_size=SIZES["vocab_size"]))
    expected = llama_logits(llama_of(variant), tokens)
    assert expected.std() > 0.5, "logits too alike to compare"
    found = level_1_logits(imported_of(variant), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_there_and_back_changes_no_byte(
    llama_of: Folders, imported_of: Folders, variant: str, tmp_path: Path
) -> None:
    llama, back = llama_of(variant), tmp_path / "back"
    export_llama(imported_of(variant), back)
    found, expected = read_tensors(back), read_tensors(llama)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert open_llama(back).config.to_diff_dict() == open_llama(llama).config.to_diff_dict()
    carried = {path.name for path in llama.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in back.iterdir()} == carried | {"model.safetensors"}
    for name in carried - {"config.json"}:
        assert (back / name).read_bytes() == (llama / name).read_bytes()


def test_one_of_the_checkpoints_has_shards_of_bf16(llama_of: Folders) -> None:
    assert len(list(llama_of("bf16 shards").glob("model-*.safetensors"))) > 3
    tensors = read_tensors(llama_of("bf16 shards")).values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("variant", [name for name in COLMS if "gelu" not in name])
def test_level_1_of_any_model_is_a_llama(variant: str, tmp_path: Path) -> None:
    save_model(random_model(COLMS[variant]), tmp_path / "colm")
    export_llama(tmp_path / "colm", tmp_path / "llama")
    tokens = make_prompt(40, COLMS[variant])
    expected = level_1_logits(tmp_path / "colm", tokens)
    assert expected.std() > 0.5, "logits too alike to compare"
    found = llama_logits(tmp_path / "llama", tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_another_feed_forward_is_no_llama_s(tmp_path: Path) -> None:
    save_model(random_model(COLMS["air-gelu"]), tmp_path / "colm")
    with pytest.raises(CheckpointError, match=r"config\.json: ffn: 'gelu'; a LLaMA has 'swiglu'"):
        export_llama(tmp_path / "colm", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
