"""One prompt at its prefill worker: how far it has come, and the pages it has."""

from __future__ import annotations

from dataclasses import dataclass, field

from colm_serve.core import PrefillRequest


@dataclass(eq=False, slots=True)
class PrefillJob:
    """One prompt on its way through chain 1; the first `num_computed` tokens are through.

    The first `num_cached` of them were in the prefix cache when it got its pages, and its
    receiver has those before `num_sent`. `num_overtaking_pages` went to later jobs before.
    Nothing is computed of one that `is_cancelled`.
    """

    request: PrefillRequest
    deadline: float | None = None
    pages: tuple[int, ...] = ()
    block_digests: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_computed: int = 0
    num_sent: int = 0
    num_overtaking_pages: int = 0
    is_cancelled: bool = False
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.request.tokens)

    @property
    def num_left(self) -> int:
        """Tokens still to be computed."""
        return self.num_tokens - self.num_computed

    @property
    def num_unsent(self) -> int:
        """Computed tokens that the receiver wants and has not taken yet."""
        return max(0, self.num_computed - max(self.num_sent, self.request.ship_from))
