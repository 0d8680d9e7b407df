"""A Hugging Face LLaMA folder becomes a CoLM of one chain, tensor by tensor."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from colm_serve.convert.hf_checkpoint import HfCheckpoint
from colm_serve.convert.hf_config import read_hf_config
from colm_serve.convert.llama_tensors import EMBEDDING, HEAD, llama_tensors
from colm_serve.convert.new_model import check_new
from colm_serve.convert.tensor_file import Report, write_tensor_file
from colm_serve.convert.tokenizer_files import check_tokenizer, copy_tokenizer
from colm_serve.errors import CheckpointError
from colm_serve.model.chain_file import chain_header, chain_path
from colm_serve.model.config import ColmConfig
from colm_serve.model.folder import new_model

#: What older checkpoints also hold, though the configuration gives it.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def import_llama(source: Path, out: Path, report: Report | None = None) -> ColmConfig:
    """Write `source` as a CoLM folder that computes the same logits; returns its config.

    Weights keep their dtype and bits. One tensor is in memory at a time.

    Args:
        source: a LlamaForCausalLM folder with safetensors and tokenizer.json.
        out: must not be there yet; comes to be when all of it is written.
        report: told how many bytes of the weights have been written.

    Raises:
        CheckpointError: the folder is missing something, damaged, or not a LLaMA's; the message
            names file and tensor or key, what was found and what was expected.
        InvalidArgument: `out` is there.
    """
    config = read_hf_config(source)
    check_tokenizer(source, config.vocab_size)
    checkpoint = HfCheckpoint(source)
    names = _match_tensors(checkpoint, config)
    check_new(out)
    with new_model(out) as folder:
        write_tensor_file(
            chain_path(folder, 1),
            {stored: checkpoint.specs[name] for stored, name in names.items()},
            lambda stored: checkpoint.read(names[stored]),
            lambda digest: chain_header(1, digest),
            report,
        )
        config.save(folder)
        copy_tokenizer(source, folder)
    return config


def _match_tensors(checkpoint: HfCheckpoint, config: ColmConfig) -> dict[str, str]:
    """The checkpoint's name of each of the CoLM's tensors; nothing else may be there."""
    names = {}
    for tensor in llama_tensors(config):
        names[tensor.stored] = tensor.name
        if tensor.name not in checkpoint.specs:
            raise CheckpointError(
                f"{checkpoint.contents}: tensor {tensor.name} is missing, expected with shape "
                f"{tensor.shape}"
            )
        found = checkpoint.specs[tensor.name].shape
        if found != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path_of(tensor.name)}: tensor {tensor.name} has shape {found}, "
                f"expected {tensor.shape} by config.json"
            )
    unexpected = checkpoint.specs.keys() - names.values()
    if config.tie_embeddings and HEAD in unexpected:
        _check_tied(checkpoint)
        unexpected -= {HEAD}
    for name in sorted(unexpected):
        if not _COMPUTED.fullmatch(name):
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: tensor {name} of shape {checkpoint.specs[name].shape}"
                " has no place in a LLaMA of config.json's sizes"
            )
    return names


def _check_tied(checkpoint: HfCheckpoint) -> None:
    """Some tied checkpoints hold the head too: then it must be the embedding."""
    if not torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING)):
        raise CheckpointError(
            f"{checkpoint.path_of(HEAD)}: tensor {HEAD} is not {EMBEDDING}, and config.json "
            "says tie_word_embeddings: true"
        )
