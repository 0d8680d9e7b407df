"""Synthetic traces: arrivals, lengths, SLA classes, conversations and shared prefixes."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from colm_serve.config import load_yaml
from colm_serve.simulate.arrivals import Arrivals, PoissonArrivals
from colm_serve.simulate.trace import Block, TracedRequest

Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Frozen):
    """Log-normal numbers of tokens; `spread` is the standard deviation over the mean."""

    mean: float = Field(ge=1)
    spread: float = Field(default=0.5, ge=0)
    max: Count = 2048

    @model_validator(mode="after")
    def _mean_is_allowed(self) -> Lengths:
        if self.mean > self.max:
            raise ValueError(f"mean {self.mean:g} is above max {self.max}")
        return self

    @cached_property
    def _log_normal(self) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm."""
        variance = math.log1p(self.spread**2)
        return math.log(self.mean) - variance / 2, math.sqrt(variance)

    def draw(self, draw: random.Random) -> int:
        length = draw.lognormvariate(*self._log_normal)
        return min(self.max, max(1, round(length)))


class RequestKind(_Frozen):
    """A part of the requests, as large as its `weight`; an empty class is the default one."""

    weight: float = Field(default=1.0, gt=0)
    sla_class: str = ""
    prompt: Lengths = Lengths(mean=256)
    output: Lengths = Lengths(mean=64, max=512)


class Conversations(_Frozen):
    """Each turn's prompt is all that was said before and a new message."""

    mean_turns: float = Field(default=1.0, ge=1, description="geometrically distributed")
    mean_pause_s: float = Field(default=20.0, gt=0, description="from turn to turn, exponential")
    num_shared_prefixes: int = Field(default=0, ge=0, description="system prompts to begin with")
    shared_prefix_tokens: Count = 256


class SyntheticTrace(_Frozen):
    """A trace that is drawn from `seed` as it is played."""

    num_requests: Count
    arrivals: Arrivals = PoissonArrivals(rate_per_s=1.0)
    kinds: tuple[RequestKind, ...] = Field(default=(RequestKind(),), min_length=1)
    conversations: Conversations = Conversations()
    seed: int = Field(default=0, ge=0)

    def requests(self) -> Iterator[TracedRequest]:
        return islice(self._all(), self.num_requests)

    def _all(self) -> Iterator[TracedRequest]:
        """Turns in order of arrival; `arrivals` gives the first of each conversation."""
        draw = random.Random(self.seed)
        conversations = self.conversations
        begins = self.arrivals.model_copy(
            update={"rate_per_s": self.arrivals.rate_per_s / conversations.mean_turns}
        ).times(random.Random(draw.random()))
        block_ids = count(conversations.num_shared_prefixes)
        order = count()
        weights = list(accumulate(kind.weight for kind in self.kinds))
        turns: _Turns = []
        for begin_s in begins:
            while turns and turns[0][0] <= begin_s:
                yield self._turn(*heapq.heappop(turns), turns, block_ids, draw)
            kind = self.kinds[0]
            if len(self.kinds) > 1:
                (kind,) = draw.choices(self.kinds, cum_weights=weights)
            conversation = _Conversation(kind, self._draw_num_turns(draw))
            if conversations.num_shared_prefixes:
                prefix = draw.randrange(conversations.num_shared_prefixes)
                conversation.blocks += (Block(prefix, conversations.shared_prefix_tokens),)
            yield self._turn(begin_s, next(order), conversation, turns, block_ids, draw)

    def _turn(
        self,
        now: float,
        order: int,
        conversation: _Conversation,
        turns: _Turns,
        block_ids: Iterator[int],
        draw: random.Random,
    ) -> TracedRequest:
        """The conversation's next request; the one after it is put among `turns`."""
        kind = conversation.kind
        blocks = (*conversation.blocks, Block(next(block_ids), kind.prompt.draw(draw)))
        num_output = kind.output.draw(draw)
        conversation.num_turns_left -= 1
        if not conversation.num_turns_left:
            return TracedRequest(now, blocks, num_output, kind.sla_class)
        output_id = next(block_ids)
        conversation.blocks = (*blocks, Block(output_id, num_output))
        pause_s = draw.expovariate(1 / self.conversations.mean_pause_s)
        heapq.heappush(turns, (now + pause_s, order, conversation))
        return TracedRequest(now, blocks, num_output, kind.sla_class, output_id)

    def _draw_num_turns(self, draw: random.Random) -> int:
        mean = self.conversations.mean_turns
        if mean == 1:
            return 1
        return 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / mean))

    @classmethod
    def load(cls, path: Path) -> SyntheticTrace:
        """Read a trace's YAML description.

        Raises:
            InvalidConfig: not there, not YAML, an unknown key or a value that is not allowed.
        """
        return load_yaml(cls, "trace", path)


@dataclass(eq=False, slots=True)
class _Conversation:
    kind: RequestKind
    num_turns_left: int
    blocks: tuple[Block, ...] = ()


#: When each conversation goes on.
_Turns = list[tuple[float, int, _Conversation]]
