"""Conversions hold no more than a tensor, however large the model is, and report progress."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from colm_serve.convert.export_llama import export_llama
from colm_serve.convert.hf_config import hf_config
from colm_serve.convert.import_llama import import_llama
from colm_serve.convert.llama_tensors import llama_tensors
from colm_serve.model.config import ColmConfig
from tests.model.models import unseal

MIB = 2**20
#: Weights of 70 MiB in bf16; the largest tensor has 6 of them, and so has a layer.
CONFIG = ColmConfig(
    vocab_size=6144, chains=(1,), d_model=512, d_ff=1536, num_layers=10, num_heads=8,
    num_kv_heads=2, head_dim=64, max_context=64, kv_repeat="interleave",
)  # fmt: skip
TENSOR_BYTES = 6144 * 512 * 2
NUM_SHARDS = 4


class Watch:
    """Notes the highest memory of this process, mapped files and all, and the progress."""

    def __init__(self) -> None:
        self._before = psutil.Process().memory_info().rss
        self.peak_bytes = 0
        self.reports: list[tuple[int, int]] = []

    def __call__(self, num_written: int, num_total: int) -> None:
        self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss - self._before)
        self.reports.append((num_written, num_total))

    def check(self) -> None:
        total = self.reports[-1][1]
        assert total > 60 * MIB
        assert self.reports[-1] == (total, total)
        assert all(a < b and total == of for (a, of), (b, _) in pairwise(self.reports))
        assert self.peak_bytes < 2 * TENSOR_BYTES, "a shard and a layer take 4 times a tensor"


def write_shards(folder: Path) -> None:
    tensors = list(llama_tensors(CONFIG))
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        own = tensors[shard::NUM_SHARDS]
        save_file({t.name: torch.ones(t.shape, dtype=torch.bfloat16) for t in own}, folder / name)
        weight_map |= {tensor.name: name for tensor in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), "utf-8")


@pytest.fixture(scope="module")
def llama(llama_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG, "bfloat16")), "utf-8")
    shutil.copy(llama_of("grouped") / "tokenizer.json", folder)
    write_shards(folder)
    return folder


def test_an_import_holds_less_than_two_tensors(llama: Path, tmp_path: Path) -> None:
    watch = Watch()
    import_llama(llama, tmp_path / "colm", watch)
    watch.check()


def test_an_export_that_reorders_heads_does_too(llama: Path, tmp_path: Path) -> None:
    import_llama(llama, tmp_path / "colm")
    unseal(tmp_path / "colm")
    replace(CONFIG, kv_repeat="tile").save(tmp_path / "colm")
    watch = Watch()
    export_llama(tmp_path / "colm", tmp_path / "back", watch)
    watch.check()
