"""How long work takes, as measured where it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class StepCost:
    """A decode worker's measured step time.

    A step takes the sum over chains i of `chain_s[i]` (when any row uses the chain: its weights
    are read once), `row_s[i]` for each row beyond the first, `wide_row_s[i]` more for each beyond
    the first `NUM_NARROW_ROWS` (then arithmetic, not memory, sets the pace), and
    `cached_token_s[i]` for each token that one of the rows attends to.
    """

    NUM_NARROW_ROWS: ClassVar[int] = 8

    chain_s: tuple[float, ...]
    row_s: tuple[float, ...]
    wide_row_s: tuple[float, ...] = ()
    cached_token_s: tuple[float, ...] = ()

    def step_s(
        self, rows_per_chain: Sequence[int], cached_tokens_per_chain: Sequence[int] = ()
    ) -> float:
        """Predicted seconds of a step.

        Args:
            rows_per_chain: how many rows chain i serves.
            cached_tokens_per_chain: how many tokens they attend to, all rows together.
        """
        attended = cached_tokens_per_chain or (0,) * len(rows_per_chain)
        chains = range(len(rows_per_chain))
        return sum(map(self.chain_step_s, chains, rows_per_chain, attended))

    def chain_step_s(self, chain: int, num_rows: float, num_cached_tokens: float) -> float:
        """One chain's part of a step; 0 where nothing has been measured of it."""
        if num_rows <= 0 or chain >= len(self.chain_s):
            return 0.0
        seconds = self.chain_s[chain] + self.row_s[chain] * (num_rows - 1)
        if num_rows > self.NUM_NARROW_ROWS and self.wide_row_s:
            seconds += self.wide_row_s[chain] * (num_rows - self.NUM_NARROW_ROWS)
        if self.cached_token_s:
            seconds += self.cached_token_s[chain] * num_cached_tokens
        return seconds


@dataclass(frozen=True)
class PrefillCost:
    """A prefill worker's measured time of a pass over up to `chunk_tokens` tokens.

    It takes `pass_s`, `token_s` for each token and `attended_key_s` for each key that one of them
    attends to: those before it and its own.
    """

    pass_s: float
    token_s: float
    attended_key_s: float
    chunk_tokens: int

    @staticmethod
    def num_attended_keys(start: int, stop: int) -> int:
        """Keys that the tokens [start, stop) of a prompt attend to, all together."""
        return (stop - start) * (start + stop + 1) // 2

    def seconds(self, start: int, stop: int) -> float:
        """Predicted seconds to compute the tokens [start, stop) of one prompt alone."""
        num_tokens = stop - start
        if num_tokens <= 0:
            return 0.0
        return (
            self.pass_s * -(-num_tokens // max(1, self.chunk_tokens))
            + self.token_s * num_tokens
            + self.attended_key_s * self.num_attended_keys(start, stop)
        )


@dataclass(frozen=True)
class TransferCost:
    """A decode worker's measured time of a call for keys and values, and of a token's on the way.

    0 until measured.
    """

    call_s: float = 0.0
    token_s: float = 0.0
