"""The bytes of single tokens, of the kinds of tokenizer that models have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from colm_serve.model.vocabulary import piece_bytes
from colm_serve.router.tokenizer import Tokenizer
from tests.router.cluster import save_tokenizer, trained_tokenizer
from tests.router.scripted import VOCAB_SIZE

TEXT = "def add(first):  # naïve 東京 🙂 Ω"


def test_the_bytes_of_a_texts_tokens_are_the_texts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    token_ids = tokenizer.encode(TEXT)
    parts = [tokenizer.token_bytes(token_id) for token_id in token_ids]
    assert b"".join(parts) == TEXT.encode("utf-8")
    assert any(part.decode("utf-8", "replace") != part.decode("utf-8", "ignore") for part in parts)


def test_every_token_has_its_own_bytes(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    everything = [tokenizer.token_bytes(token_id) for token_id in range(VOCAB_SIZE)]
    assert len(set(everything)) == VOCAB_SIZE
    assert everything[0] == b"<|endoftext|>"
    assert {bytes([value]) for value in range(256)} <= set(everything)


def test_a_word_keeps_the_space_before_it(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "▁the": 2, "the": 3, "<0xE6>": 4, "é": 5}
    made = HfTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    got = [tokenizer.token_bytes(token_id) for token_id in range(1, 6)]
    assert got == [b" ", b" the", b"the", b"\xe6", "é".encode()]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("<0x0A>", b"\n"), ("Ġa", b" a"), ("æĿ", b"\xe6\x9d"), ("�", "�".encode())],
)
def test_pieces(piece: str, expected: bytes) -> None:
    assert piece_bytes(piece) == expected


def test_the_alphabet_is_the_librarys() -> None:
    assert trained_tokenizer().get_vocab_size() == VOCAB_SIZE
    values = [piece_bytes(character) for character in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(values) == [bytes([value]) for value in range(256)]
