"""One request at its decode worker: its tokens, its pages, and where in its life it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from colm_serve.core import DecodeRequest, FinishReason


class Stage(Enum):
    """Where a sequence is in its life at this worker."""

    WAITING = auto()  # preempted: without pages until it is the oldest that wants some
    AWAITING_KV = auto()  # others may be writing K and V into its pages
    PREFILLING = auto()  # the K and V it lacks are computed here, chunk by chunk
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One request; the first `num_computed` tokens have their K and V in its pages.

    If the prompt's logprobs are asked for, what follows its first `num_prompt_scored` tokens has
    been scored.
    Speculation sets `num_drafts`, how many drafted tokens its next step is to verify. While it
    `is_held` it takes no step.
    """

    request: DecodeRequest
    age: int  # the number of those admitted before it
    level: int
    ending_token_ids: frozenset[int]
    tokens: list[int] = field(init=False)
    pages: tuple[int, ...] = ()
    block_digests: list[bytes] = field(default_factory=list)
    num_cached: int = 0  # found in the prefix cache when it was admitted
    num_shipped: int = 0
    num_computed: int = 0
    num_prompt_scored: int = 0
    num_drafts: int = 0
    is_held: bool = False
    num_preemptions: int = 0
    stage: Stage = Stage.WAITING

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output at most."""
        return self.num_prompt + self.request.sampling.max_tokens

    @property
    def num_prefill(self) -> int:
        """Tokens whose K and V are needed before a step; the last one's come with the step."""
        return len(self.tokens) - 1

    @property
    def num_missing(self) -> int:
        return self.num_prefill - self.num_computed

    @property
    def is_scoring(self) -> bool:
        """Tokens of the prompt have yet to be scored: they are run here, at its level."""
        is_asked = self.request.sampling.prompt_logprobs is not None
        return is_asked and self.num_prompt_scored < self.num_prompt - 1

    def extend(self, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Add what a step made, up to the token that ends the text.

        Returns:
            The tokens added and why the text ends there, None if it goes on.
        """
        for num_added, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            reason = self._finish_reason(token)
            if reason is not None:
                return tokens[:num_added], reason
        return tokens, None

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self.ending_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_length else None
