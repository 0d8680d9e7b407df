"""The bytes behind a vocabulary's entries that are not whole UTF-8 characters."""

from __future__ import annotations

import re

#: What decoders put for bytes that are no UTF-8 character, or not yet.
REPLACEMENT = "\ufffd"

#: How vocabularies with byte fallback write a single byte.
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def piece_bytes(piece: str) -> bytes:
    """The bytes of a vocabulary entry, as byte-level and byte-fallback tokenizers write them."""
    if fallback := _FALLBACK.fullmatch(piece):
        return bytes.fromhex(fallback[1])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode("utf-8")
