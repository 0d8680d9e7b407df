"""A model folder's tokenizer file, and the bytes behind its tokens."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from colm_serve.errors import CheckpointError

#: What decoders put for bytes that are no UTF-8 character, or not yet.
REPLACEMENT = "\ufffd"

#: How vocabularies with byte fallback write a single byte.
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Read tokenizer.json; None without one. Texts are neither cut nor padded, whatever it says.

    Raises:
        CheckpointError: the file is there but cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_model_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder that must have one, and one that its model's vocabulary holds.

    Raises:
        CheckpointError: it is missing or damaged, or belongs to another model.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: no such file; save_pretrained of transformers' "
            "AutoTokenizer writes it"
        )
    check_vocabulary(tokenizer, folder, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Raise CheckpointError unless a model of this vocabulary knows all of the folder's tokens."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: of another model: it has token id {highest}, and "
            f"config.json's vocab_size is {vocab_size}"
        )


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text, special ones too; part of a UTF-8 character perhaps."""
    return _bytes_of(tokenizer, [token_id])[0]


def text_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """What each of a model's tokens adds to a text: nothing if special, or beyond the tokenizer."""
    num_known = min(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
    added = tokenizer.get_added_tokens_decoder()
    texts = _bytes_of(tokenizer, list(range(num_known)))
    for token_id, token in added.items():
        if token.special and token_id < num_known:
            texts[token_id] = b""
    return texts + [b""] * (vocab_size - num_known)


def piece_bytes(piece: str) -> bytes:
    """The bytes of a vocabulary entry, as byte-level and byte-fallback tokenizers write them."""
    if fallback := _FALLBACK.fullmatch(piece):
        return bytes.fromhex(fallback[1])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode("utf-8")


def _bytes_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[bytes]:
    # Some decoders drop the space that begins a text, so a token is looked at in its middle.
    once, twice = (
        tokenizer.decode_batch([[i] * count for i in token_ids], skip_special_tokens=False)
        for count in (1, 2)
    )
    return [
        piece_bytes(str(tokenizer.id_to_token(token_id)))
        if REPLACEMENT in one
        else two[len(one) :].encode("utf-8")
        for token_id, one, two in zip(token_ids, once, twice, strict=True)
    ]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
