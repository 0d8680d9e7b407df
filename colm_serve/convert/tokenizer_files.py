"""The files beside a model's weights that a server needs: tokenizer, chat template, settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from colm_serve.convert.hf_config import GENERATION_FILE
from colm_serve.errors import CheckpointError
from colm_serve.json_file import read_json
from colm_serve.model.vocabulary import load_tokenizer

_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", GENERATION_FILE)
_FILES = ("tokenizer.json", *_JSON_FILES, "chat_template.jinja")


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Check that a folder has a tokenizer, and that the model knows all of its tokens.

    Raises:
        CheckpointError: a file is missing or damaged, or it belongs to another model.
    """
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{path}: no such file; save_pretrained of transformers' AutoTokenizer writes it"
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: of another model: it has token id {highest}, and config.json's vocab_size "
            f"is {vocab_size}"
        )
    for name in _JSON_FILES:
        if (folder / name).exists():
            read_json(folder / name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy those of the files that there are."""
    for name in _FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
