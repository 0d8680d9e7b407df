"""One request under way at the simulated router."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.config import SlaClass
from colm_serve.core import Member
from colm_serve.router.admission import Ticket
from colm_serve.router.placing.facts import Placement, RequestFacts
from colm_serve.router.placing.snapshot import Work
from colm_serve.simulate.sequence import VirtualSequence
from colm_serve.simulate.trace import Block, TracedRequest


@dataclass(eq=False, slots=True)
class VirtualRequest:
    """As `router.running.RunningRequest`; its prompt is kept only while it is being placed."""

    request_id: str
    traced: TracedRequest
    sla_name: str
    sla: SlaClass
    num_levels: int
    num_prompt: int
    ticket: Ticket
    heavier_tpot_s: float | None = None
    refused_by: frozenset[Member] = frozenset()
    num_attempts: int = 0
    placement: Placement | None = None
    sequence: VirtualSequence | None = None
    level: int = 0
    _prompt: tuple[int, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        if not self._prompt:
            self._prompt = self.traced.prompt()
        return self._prompt

    def forget_prompt(self) -> None:
        self._prompt = ()

    @property
    def deadline(self) -> float:
        """Until when it may take."""
        return self.traced.arrival_s + self.sla.deadline_s

    @property
    def max_level(self) -> int:
        return self.sla.max_level or self.num_levels

    @property
    def tpot_s(self) -> float | None:
        return None if self.sla.tpot_ms is None else self.sla.tpot_ms / 1e3

    def remaining_ttft_s(self, now: float) -> float | None:
        """Seconds until the first token is due, if there is a target."""
        if self.sla.ttft_ms is None:
            return None
        return max(0.0, self.traced.arrival_s + self.sla.ttft_ms / 1e3 - now)

    def facts(self, now: float) -> RequestFacts:
        return RequestFacts(
            prompt=self.prompt,
            max_tokens=self.traced.num_output_tokens,
            min_level=self.sla.min_level,
            max_level=self.max_level,
            ttft_s=None if self.sla.ttft_ms is None else self.sla.ttft_ms / 1e3,
            tpot_s=self.tpot_s,
            deadline_s=self.sla.deadline_s,
            age_s=now - self.traced.arrival_s,
            is_begun=self.num_attempts > 0,
            heavier_tpot_s=self.heavier_tpot_s,
            refused_by=self.refused_by,
        )

    def work(self, placement: Placement) -> Work:
        """What it costs its decode worker."""
        max_tokens = self.traced.num_output_tokens
        level, min_level = placement.level, self.sla.min_level
        return Work(level, self.num_prompt, max_tokens, self.tpot_s, min_level)

    def all_blocks(self) -> tuple[Block, ...]:
        """Of its prompt, and the one of its output, which is new if no later prompt holds it."""
        output_id = self.traced.output_id
        output_id = -int(self.request_id) if output_id is None else output_id
        return (*self.traced.blocks, Block(output_id, self.traced.num_output_tokens))
