"""A trace: when requests come, how long they are, and which prefixes they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Block(NamedTuple):
    """A run of tokens; the same `block_id` stands for the same tokens behind the same prefix."""

    block_id: int
    num_tokens: int


class TracedRequest(NamedTuple):
    """One request of a trace, `arrival_s` after its begin.

    `output_id` names the block that its output is, should a later prompt hold it; None if none
    does. An empty `sla_class` is the cluster's default one.
    """

    arrival_s: float
    blocks: tuple[Block, ...]
    num_output_tokens: int
    sla_class: str = ""
    output_id: int | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(block.num_tokens for block in self.blocks)

    def prompt(self) -> tuple[int, ...]:
        """Token ids that repeat where blocks do: all that routing asks of them."""
        tokens: tuple[int, ...] = ()
        for block_id, num_tokens in self.blocks:
            tokens += (block_id,) * num_tokens
        return tokens


class Trace(Protocol):
    """Requests in order of arrival, made or read one at a time."""

    def requests(self) -> Iterator[TracedRequest]:
        """From the first request on; the same ones each time."""
