"""What the model thought of a token, and of those it did not choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the log of the probability that the model itself, unfiltered, gave it.

    The first token of a text has none: nothing predicts it.
    """

    token_id: int
    logprob: float | None
    token: bytes = b""  # its UTF-8 bytes, where known; part of a character perhaps


@dataclass(frozen=True)
class Logprobs:
    """The chosen token's logprob and those of the likeliest tokens, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
