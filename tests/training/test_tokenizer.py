from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.corpus import Document
from colm_serve.training.document_encoder import DocumentEncoder
from colm_serve.training.tokenizer import (
    SPECIAL_TOKENS,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)
from tests.training.runs import MODEL

TEXT = "def f(x):\n    return 'naïve – 日本' + x\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(train_tokenizer([TEXT] * 20, 290), tmp_path, max_context=64)
    return tmp_path


def test_any_text_survives_and_its_bytes_are_counted(folder: Path) -> None:
    tokenizer = load_model_tokenizer(folder, 290)
    for text in (TEXT, "\x00\t \n\r  🙂 unseen", ""):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_documents_carry_header_and_end(folder: Path) -> None:
    tokenizer = load_model_tokenizer(folder, 290)
    document = Document("a/b.py", TEXT)
    ids = DocumentEncoder(tokenizer, MODEL, "corpus").encode([document])
    shown = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert shown == f"<|system|>corpus<|user|>a/b.py<|assistant|>{TEXT}<|endoftext|>"
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_another_model_s_tokenizer_frames_documents_by_its_own_tokens() -> None:
    tokenizer = Tokenizer(BPE(fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = ByteFallback()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([f"<0x{byte:02X}>" for byte in range(256)] + ["def", " "])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = replace(MODEL, bos_token_id=0, eos_token_ids=(1, 0))
    documents = [Document("a.py", "def def"), Document("b.py", " ")]
    ids = DocumentEncoder(tokenizer, config, "corpus").encode(documents)
    word, space = tokenizer.token_to_id("def"), tokenizer.token_to_id(" ")
    assert ids.tolist() == [0, word, space, word, 1, 0, space, 1]
    assert token_bytes(tokenizer)[ids].tolist() == [0, 3, 1, 3, 0, 0, 1, 0]


def test_chat_template_lays_a_conversation_out_as_a_document(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (settings["bos_token"], settings["eos_token"]) == (None, "<|endoftext|>")
    messages = [{"role": "user", "content": "a/b.py"}]
    template = jinja2.Template(settings["chat_template"])
    shown = template.render(messages=messages, add_generation_prompt=True)
    assert shown == "<|user|>a/b.py<|assistant|>"
    messages.append({"role": "assistant", "content": "x = 1"})
    assert template.render(messages=messages).endswith("<|assistant|>x = 1<|endoftext|>")
