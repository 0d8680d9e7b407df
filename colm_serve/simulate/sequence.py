"""One request at a simulated decode worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from colm_serve.core import Member
from colm_serve.decode_worker.sequence import Stage
from colm_serve.prefill_worker.job import PrefillJob
from colm_serve.simulate.page_counts import Holding
from colm_serve.simulate.prefill import VirtualPrefillWorker
from colm_serve.simulate.trace import Block


@dataclass(eq=False, slots=True)
class VirtualSequence:
    """As `decode_worker.sequence.Sequence`, with its tokens by the count.

    `blocks` are those of its prompt and the one that its output becomes. While it has its place
    in a batch that steps in closed form, `num_tokens` are those it had after the worker's step
    `at_step`. `on_end` is called when its last token is made.
    """

    request_id: str
    blocks: tuple[Block, ...]
    num_prompt: int
    max_tokens: int
    level: int
    prefill: tuple[Member, ...]
    ttft_s: float | None
    on_end: Callable[[VirtualSequence], object]
    on_prompt: Callable[[], object] = lambda: None  # its first step is under way
    age: int = 0
    num_tokens: int = 0
    at_step: int = 0
    is_in_lockstep: bool = False
    event_step: int | None = None  # the step after which it ends or wants a page
    stage: Stage = Stage.AWAITING_KV
    holding: Holding = field(default_factory=Holding)
    is_growing: bool = False
    num_computed: int = 0
    num_cached: int = 0
    num_shipped: int = 0
    num_preemptions: int = 0
    job: tuple[VirtualPrefillWorker, PrefillJob] | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    _level_sum: int = 0
    _num_counted: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output."""
        return self.num_prompt + self.max_tokens

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_prefill(self) -> int:
        """Tokens whose K and V are needed before a step; the last one's come with the step."""
        return self.num_tokens - 1

    @property
    def num_missing(self) -> int:
        return self.num_prefill - self.num_computed

    def set_level(self, level: int) -> None:
        """The next tokens are made at this level."""
        self._level_sum += self.level * (self.num_output - self._num_counted)
        self._num_counted = self.num_output
        self.level = level

    @property
    def mean_level(self) -> float:
        """Of the tokens made, of which there has to be one."""
        since = self.level * (self.num_output - self._num_counted)
        return (self._level_sum + since) / self.num_output
