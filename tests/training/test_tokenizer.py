from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest

from colm_serve.training.corpus import Corpus, Document
from colm_serve.training.tokenizer import (
    SPECIAL_TOKENS,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXT = "def f(x):\n    return 'naïve – 日本' + x\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(train_tokenizer([TEXT] * 20, 290), tmp_path, max_context=64)
    return tmp_path


def test_any_text_survives_and_its_bytes_are_counted(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (TEXT, "\x00\t \n\r  🙂 unseen", ""):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_documents_carry_header_and_end(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    document = Document("a/b.py", TEXT)
    ids = encode_documents(tokenizer, Corpus("corpus", (document,), ()), [document])
    shown = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert shown == f"<|system|>corpus<|user|>a/b.py<|assistant|>{TEXT}<|endoftext|>"
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_chat_template_lays_a_conversation_out_as_a_document(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (settings["bos_token"], settings["eos_token"]) == (None, "<|endoftext|>")
    messages = [{"role": "user", "content": "a/b.py"}]
    template = jinja2.Template(settings["chat_template"])
    shown = template.render(messages=messages, add_generation_prompt=True)
    assert shown == "<|user|>a/b.py<|assistant|>"
    messages.append({"role": "assistant", "content": "x = 1"})
    assert template.render(messages=messages).endswith("<|assistant|>x = 1<|endoftext|>")
