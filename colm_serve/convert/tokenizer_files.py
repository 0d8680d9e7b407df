"""The files beside a model's weights that a server needs: tokenizer, chat template, settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from colm_serve.convert.hf_config import GENERATION_FILE
from colm_serve.json_file import read_json
from colm_serve.model.vocabulary import load_model_tokenizer

_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", GENERATION_FILE)
_FILES = ("tokenizer.json", *_JSON_FILES, "chat_template.jinja")


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Check that a folder has a tokenizer, and that the model knows all of its tokens.

    Raises:
        CheckpointError: a file is missing or damaged, or it belongs to another model.
    """
    load_model_tokenizer(folder, vocab_size)
    for name in _JSON_FILES:
        if (folder / name).exists():
            read_json(folder / name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy those of the files that there are."""
    for name in _FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
