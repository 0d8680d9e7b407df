from __future__ import annotations

from pathlib import Path

import pytest

from colm_serve.errors import CheckpointError, InvalidArgument
from colm_serve.router.request import ChatMessage
from colm_serve.router.tokenizer import Tokenizer
from tests.router.cluster import save_tokenizer, trained_tokenizer


def load(folder: Path, **settings: object) -> Tokenizer:
    save_tokenizer(folder, **settings)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def test_encode_and_decode(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    token_ids = tokenizer.encode("def add(a):\n")
    assert tokenizer.decode(token_ids) == "def add(a):\n"
    assert tokenizer.decode((*token_ids, 0)) == "def add(a):\n"


def test_a_chat_ends_where_the_assistant_speaks(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    messages = [ChatMessage("system", "Be brief."), ChatMessage("user", "hi")]
    expected = "<|system|>Be brief.<|user|>hi<|assistant|>"
    assert list(tokenizer.encode_chat(messages)) == trained_tokenizer().encode(expected).ids


@pytest.mark.parametrize("eos", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
def test_templates_know_the_special_tokens(tmp_path: Path, eos: object) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = load(tmp_path, chat_template=template, eos_token=eos, bos_token=None)
    assert tokenizer.encode_chat([ChatMessage("user", "hi")])[-1] == 0


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = load(tmp_path, chat_template=named)
    assert tokenizer.decode(tokenizer.encode_chat([ChatMessage("user", "x")])) == "yes"


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file", "utf-8")
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat([ChatMessage("user", "x")])) == "from the file"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 // (messages | length - 1) }}", "division"),
    ],
)
def test_chats_that_cannot_be_rendered(tmp_path: Path, template: object, reason: str) -> None:
    tokenizer = load(tmp_path, chat_template=template)
    with pytest.raises(InvalidArgument, match=reason) as error:
        tokenizer.encode_chat([ChatMessage("user", "x")])
    assert error.value.field == "messages"


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    with pytest.raises(InvalidArgument, match="prompt"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InvalidArgument, match="messages"):
        tokenizer.encode_chat([ChatMessage("user", "\udfff")])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_json_objects(tmp_path: Path, file: str, content: bytes) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_cannot_be_read(tmp_path: Path, file: str) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).mkdir()
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.load(tmp_path)


def test_a_template_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        load(tmp_path, chat_template="{% for %}")
