"""Level 1 of a CoLM becomes a Hugging Face LLaMA folder, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from colm_serve.convert.hf_checkpoint import SINGLE_FILE
from colm_serve.convert.hf_config import CONFIG_FILE, hf_config
from colm_serve.convert.llama_tensors import llama_tensors
from colm_serve.convert.new_model import check_new
from colm_serve.convert.tensor_file import Report, TensorSpec, write_tensor_file
from colm_serve.convert.tokenizer_files import copy_tokenizer
from colm_serve.errors import CheckpointError
from colm_serve.files import new_folder
from colm_serve.json_file import write_json
from colm_serve.model.config import ColmConfig
from colm_serve.model.folder import ModelFolder
from colm_serve.model.head_order import stored_order


def export_llama(source: Path, out: Path, report: Report | None = None) -> ColmConfig:
    """Write level 1 of the CoLM in `source` as a LlamaForCausalLM; returns its config.

    Weights keep their dtype and bits. One tensor is in memory at a time.

    Args:
        source: a model folder, of any number of chains.
        out: must not be there yet; comes to be when all of it is written.
        report: told how many bytes of the weights have been written.

    Raises:
        CheckpointError: the folder is damaged or replaced meanwhile, or its first chain is no
            LLaMA.
        InvalidArgument: `out` is there.
    """
    whole = ModelFolder.open(source, 1)
    chain = whole.chain(1)
    config = level_1(whole.config)
    _check_is_llama(source, config)
    specs = {name: TensorSpec.of(chain.read_tensor(name)) for name in chain.check_content()}
    stored_names = _match_tensors(chain.path, specs, config)

    def read(name: str) -> Tensor:
        tensor = chain.read_tensor(stored_names[name])
        if whole.config.kv_repeat == "tile":
            return stored_order(stored_names[name], config, 1, tensor)
        return tensor

    check_new(out)
    with new_folder(out) as folder:
        write_tensor_file(
            folder / SINGLE_FILE,
            {name: specs[stored_name] for name, stored_name in stored_names.items()},
            read,
            lambda digest: {"format": "pt"},
            report,
        )
        copy_tokenizer(source, folder)
        whole.check_unchanged()
        dtype = str(specs["embedding.weight"].dtype).removeprefix("torch.")
        write_json(folder / CONFIG_FILE, hf_config(config, dtype))
    return config


def level_1(config: ColmConfig) -> ColmConfig:
    """The one-chain model that a CoLM's first chain is, in LLaMA's order of query heads."""
    return replace(
        config,
        chains=(1,),
        d_model=config.chain_dims[0],
        d_ff=config.chain_ff_dims[0],
        num_heads=config.heads_per_chain[0],
        num_kv_heads=config.kv_heads_per_chain[0],
        kv_sharing="air",
        kv_repeat="interleave",
        head="shared",
    )


def _check_is_llama(source: Path, config: ColmConfig) -> None:
    if config.ffn != "swiglu":
        raise CheckpointError(f"{source / CONFIG_FILE}: ffn: {config.ffn!r}; a LLaMA has 'swiglu'")
    if config.d_model % config.num_heads:
        raise CheckpointError(
            f"{source / CONFIG_FILE}: chain 1 is {config.d_model} wide and has "
            f"{config.num_heads} query heads; a LLaMA's width is a multiple of them"
        )


def _match_tensors(path: Path, specs: dict[str, TensorSpec], config: ColmConfig) -> dict[str, str]:
    """The stored name of each of the LLaMA's tensors."""
    expected = {tensor.stored: tensor.shape for tensor in llama_tensors(config)}
    found = {stored: spec.shape for stored, spec in specs.items()}
    for stored in sorted(found.keys() | expected.keys()):
        if found.get(stored) != expected.get(stored):
            raise CheckpointError(
                f"{path}: tensor {stored} has shape {found.get(stored)}, expected "
                f"{expected.get(stored)} by config.json"
            )
    return {tensor.name: tensor.stored for tensor in llama_tensors(config)}
