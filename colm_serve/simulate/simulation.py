"""Plays a trace against a cluster that is not there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from colm_serve.config import ClusterConfig
from colm_serve.core import Member, WorkerKind
from colm_serve.errors import InvalidConfig
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.decode import VirtualDecodeWorker
from colm_serve.simulate.outcomes import Outcome
from colm_serve.simulate.prefill import VirtualPrefillWorker
from colm_serve.simulate.router import KV_IDENTITY, VirtualRouter
from colm_serve.simulate.trace import Trace


class Simulation:
    """A cluster of `prefill.count` and `decode.count` workers that cost what was measured."""

    def __init__(self, config: ClusterConfig, costs: WorkerCosts) -> None:
        """Raises InvalidConfig: a class has levels that the costs know nothing of."""
        for name, sla in config.sla_classes.items():
            for key in ("min_level", "max_level"):
                level = getattr(sla, key)
                if level is not None and level > costs.num_levels:
                    allowed = f"1 to {costs.num_levels}, the levels of the measured model"
                    raise InvalidConfig(f"sla_classes.{name}.{key}", level, allowed)
        self.clock = VirtualClock()
        self.prefill = {
            member: VirtualPrefillWorker(member, config.prefill, costs, self.clock)
            for member in _members(WorkerKind.PREFILL, config.prefill.count)
        }
        self.decode = {
            member: VirtualDecodeWorker(member, config.decode, costs, self.clock, self.prefill)
            for member in _members(WorkerKind.DECODE, config.decode.count)
        }
        self._router = VirtualRouter(
            config,
            self.clock,
            self.decode,
            self.prefill,
            num_levels=costs.num_levels,
            hop_s=costs.hop_s,
        )

    def run(self, trace: Trace) -> Outcome:
        """Play the trace to the end of its last request; once."""
        self._router.start(trace.requests())
        with _no_search_for_cycles():
            self.clock.run()
        workers = self.decode.values()
        tokens = zip(*(worker.num_tokens_by_level for worker in workers), strict=True)
        return Outcome(
            classes=self._router.outcomes,
            duration_s=self._router.ended_at,
            num_workers=len(self.decode) + len(self.prefill),
            tokens_by_level=tuple(map(sum, tokens)),
            num_level_moves=self._router.num_level_moves,
            num_preemptions=sum(worker.num_preemptions for worker in workers),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every worker has all its pages accounted for."""
        for prefill in self.prefill.values():
            prefill.check_integrity()
        for decode in self.decode.values():
            decode.check_integrity()


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """A run makes none, and looking for them in all that is under way takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _members(kind: WorkerKind, count: int) -> tuple[Member, ...]:
    names = (f"{kind.value}-{index}" for index in range(count))
    return tuple(Member(kind, name, name, 1, KV_IDENTITY) for name in names)
