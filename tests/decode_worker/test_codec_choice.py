"""Which codec is asked for, by what earlier transfers showed."""

from __future__ import annotations

import pytest

from colm_serve.core import KvLayout
from colm_serve.decode_worker.codec_choice import (
    MIN_TRANSFER_BYTES,
    CodecChoice,
    Link,
    Transfer,
    mildest_hidden,
)
from colm_serve.transport.kv_frames import EndFrame, KvFrame, OpenFrame, WaitFrame

SIZES = {"raw": 4000.0, "bf16": 2000.0, "int8": 1100.0, "fp8": 1050.0}


@pytest.mark.parametrize(
    ("bytes_per_s", "expected"),
    [
        (1e9, "raw"),
        (4e6, "raw"),
        (3.99e6, "bf16"),
        (2e6, "bf16"),
        (1.99e6, "int8"),
        (1.09e6, "fp8"),
        (1.0, "fp8"),
    ],
)
def test_the_mildest_that_keeps_up_with_1000_tokens_a_second(
    bytes_per_s: float, expected: str
) -> None:
    assert mildest_hidden(SIZES, Link(bytes_per_s, tokens_per_s=1000.0)) == expected


def transfer(bytes_per_s: float, sent: str, tokens_per_s: float = 1000.0) -> Transfer:
    """Of 10,000 tokens, over a link that carries so much."""
    num_bytes = int(10_000 * SIZES[sent])
    compute_s = 10_000 / tokens_per_s
    return Transfer(10_000, num_bytes, max(num_bytes / bytes_per_s, compute_s), compute_s)


def test_the_first_is_exact_and_a_slow_link_is_learned_at_once() -> None:
    choice = CodecChoice(SIZES)
    assert choice.choose("a") == "raw"
    choice.learn("a", transfer(1.5e6, "raw"))
    assert choice.choose("a") == "int8"
    assert choice.choose("b") == "raw", "another worker, another link"


def test_a_link_that_became_faster_is_found_out() -> None:
    choice = CodecChoice(SIZES)
    choice.learn("a", transfer(1.5e6, "raw"))
    asked = []
    while (name := choice.choose("a")) != "raw":
        asked.append(name)
        assert len(asked) < 30, "it never tries"
        choice.learn("a", transfer(1e9, name))
    assert set(asked) == {"int8", "bf16"}


def test_a_link_a_little_too_slow_is_tried_now_and_then() -> None:
    choice = CodecChoice(SIZES)
    asked = []
    for _ in range(100):
        asked.append(choice.choose("a"))
        choice.learn("a", transfer(1.9e6, asked[-1]))
    assert asked.count("int8") >= 60
    assert asked.count("bf16") == 99 - asked.count("int8")
    assert asked.count("raw") == 1


def test_a_faster_worker_takes_a_smaller_codec() -> None:
    choice = CodecChoice(SIZES)
    choice.learn("a", transfer(3e6, "raw", tokens_per_s=500.0))
    assert choice.choose("a") == "raw"
    choice.learn("a", transfer(3e6, "raw", tokens_per_s=1000.0))
    assert choice.choose("a") == "bf16"


@pytest.mark.parametrize(
    "nothing",
    [Transfer(10, MIN_TRANSFER_BYTES - 1, 100.0, 0.1), Transfer(0, 10**9, 100.0, 0.0)],
    ids=["short", "all cached"],
)
def test_what_says_nothing_is_passed_over(nothing: Transfer) -> None:
    choice = CodecChoice(SIZES)
    choice.learn("a", nothing)
    assert choice.choose("a") == "raw"


def test_a_transfer_counts_from_its_first_kv_frame() -> None:
    """Neither the queue nor what was cached at the prefill worker is held against the link."""
    layout = KvLayout(1, 1, 1, "float32")
    got = Transfer(num_tokens=100)
    got.take(OpenFrame(0, 1, "w", layout, "raw", "message", 40, 0, 0.0), 200, now=1.0)
    got.take(WaitFrame(1), 50, now=5.0)
    got.take(KvFrame(2, 0, 40, 20), 1000, now=7.0)
    got.take(KvFrame(3, 0, 60, 20), 1000, now=7.5)
    got.take(KvFrame(4, 0, 80, 20), 1000, now=9.0)
    got.take(EndFrame(5, 1.5), 50, now=9.5)
    assert (got.num_tokens, got.num_bytes, got.transfer_s, got.compute_s) == (60, 2000, 2.0, 1.5)
