from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from colm_serve.model.vocabulary import REPLACEMENT, token_bytes
from colm_serve.router.detokenizer import Detokenizer, Piece, StopMatcher
from tests.router.cluster import trained_tokenizer
from tests.router.scripted import END_OF_TEXT, VOCAB_SIZE

TEXTS = st.text(alphabet=st.sampled_from("ab cdé東🙂\n\ufffd"), max_size=30)


def decode(token_ids: Sequence[int]) -> str:
    return trained_tokenizer().decode(list(token_ids), skip_special_tokens=True)


def byte_fallback() -> HfTokenizer:
    """A decoder in the manner of Llama 2: bytes as tokens, words with a leading space mark."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁hi": 256, "▁you": 257, "x": 258}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[Piece]:
    """Every piece up to the stop, or with the last flush."""
    got: list[Piece] = []
    for token_id in token_ids:
        got.append(detokenizer.push(token_id))
        if got[-1].is_stop:
            return got
    return [*got, detokenizer.flush()]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_the_pieces_are_the_whole_text(token_ids: list[int]) -> None:
    got = pieces(Detokenizer(decode), token_ids)
    assert "".join(piece.text for piece in got) == decode(token_ids)


@given(
    st.lists(st.sampled_from([[256], [257], [258], *(list(c.encode()) for c in "é東🙂\ufffda")]))
)
def test_the_pieces_are_the_whole_text_of_a_byte_fallback_decoder(parts: list[list[int]]) -> None:
    token_ids = [token_id for part in parts for token_id in part]
    tokenizer = byte_fallback()
    got = pieces(Detokenizer(lambda ids: tokenizer.decode(list(ids))), token_ids)
    assert "".join(piece.text for piece in got) == tokenizer.decode(token_ids)


@given(TEXTS)
def test_no_replacement_character_that_is_not_in_the_text(text: str) -> None:
    token_ids = trained_tokenizer().encode(text).ids
    got = pieces(Detokenizer(decode), token_ids)
    assert "".join(piece.text for piece in got) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece.text for piece in got)


def byte_token(byte: int) -> int:
    [token_id] = [
        i for i in range(VOCAB_SIZE) if token_bytes(trained_tokenizer(), i) == bytes([byte])
    ]
    return token_id


#: Tokens after which a character may always be incomplete, and those that decoding leaves out.
DOUBTFUL = {
    "a byte that begins nothing": [0x80],
    "an end and a begin": [0x9D, 0xB1, 0xE6],
    "bytes of U+FFFD": [0xEF, 0xBF, 0xBD],
}


@pytest.mark.parametrize("kind", [*DOUBTFUL, "ends of text"])
def test_a_text_in_doubt_costs_what_its_tokens_do(kind: str) -> None:
    num_decoded = 0

    def counting(token_ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(token_ids)

    again = [byte_token(b) for b in DOUBTFUL[kind]] if kind in DOUBTFUL else [END_OF_TEXT]
    token_ids = (again * 16_000)[:16_000]
    got = pieces(Detokenizer(counting), token_ids)
    assert "".join(piece.text for piece in got) == decode(token_ids)
    assert num_decoded < 50 * len(token_ids)


@given(
    st.lists(
        st.one_of(
            st.sampled_from([[byte_token(b) for b in again] * 10 for again in DOUBTFUL.values()]),
            st.just([END_OF_TEXT] * 20),
            st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
        ),
        max_size=6,
    )
)
def test_the_pieces_are_the_whole_text_however_long_the_doubt(parts: list[list[int]]) -> None:
    token_ids = [token_id for part in parts for token_id in part]
    got = pieces(Detokenizer(decode), token_ids)
    assert "".join(piece.text for piece in got) == decode(token_ids)


def test_a_character_of_several_tokens_comes_whole() -> None:
    token_ids = trained_tokenizer().encode("🦜").ids
    assert len(token_ids) > 1
    got = pieces(Detokenizer(decode), token_ids)
    assert [piece.text for piece in got if piece.text] == ["🦜"]


def test_ordinary_text_is_not_held_back() -> None:
    token_ids = trained_tokenizer().encode("def add(first").ids
    detokenizer = Detokenizer(decode)
    assert all(detokenizer.push(token_id).text for token_id in token_ids)


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; the plain definition."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text(alphabet="abc", max_size=20),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=6),
)
@settings(max_examples=300)
def test_stop_strings_however_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stop)
    bounds = [0, *sorted(cuts), len(text)]
    got, is_stop = "", False
    for begin, end in pairwise(bounds):
        piece = matcher.push(text[begin:end])
        got += piece.text
        if piece.is_stop:
            is_stop = True
            break
    else:
        got += matcher.flush()
    assert (got, is_stop) == cut_at(text, stop)


@given(st.text(alphabet="ab", max_size=60), st.integers(2, 12), st.integers(0, 60))
def test_stop_strings_that_repeat_themselves(text: str, length: int, cut: int) -> None:
    stop = ["a" * length + "b", "ab" * length, "ba" * length]
    matcher = StopMatcher(stop)
    got = [matcher.push(text[:cut])]
    if not got[-1].is_stop:
        got.append(matcher.push(text[cut:]))
    is_stop = got[-1].is_stop
    rest = "" if is_stop else matcher.flush()
    assert ("".join(piece.text for piece in got) + rest, is_stop) == cut_at(text, stop)


def test_a_possible_stop_string_is_held_back_no_longer_than_needed() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.push("word E") == Piece("word ")
    assert matcher.push("N") == Piece("")
    assert matcher.push("T\n") == Piece("ENT")
    assert matcher.push("x") == Piece("\nx")
    assert matcher.push("END") == Piece("", is_stop=True)


def test_a_stop_string_in_what_was_held_back_to_the_last_counts() -> None:
    token_ids = trained_tokenizer().encode("a🦜").ids[:-1]
    got = pieces(Detokenizer(decode, [REPLACEMENT]), token_ids)
    assert got[-1] == Piece("", is_stop=True)


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces(Detokenizer(None), [1, 2]) == [Piece("")] * 3


def test_stop_strings_count_from_min_tokens_on() -> None:
    words = {1: "a stop ", 2: "then st", 3: "op, stop", 4: "never"}
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids), ["stop"], min_tokens=2)
    got = [detokenizer.push(token_id) for token_id in (1, 2, 3)]
    assert got == [Piece("a stop "), Piece("then st"), Piece("op, ", is_stop=True)]
