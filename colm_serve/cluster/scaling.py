"""What brings the workers there are to the numbers of a plan: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colm_serve.cluster.placement import Role, Slot
from colm_serve.router.planner import Plan


@dataclass(frozen=True)
class Scaling:
    """Prefill workers that become decode workers, workers to add, and workers to let go."""

    converted: tuple[Slot, ...]
    added: tuple[Role, ...]
    removed: tuple[Slot, ...]

    @property
    def is_change(self) -> bool:
        return bool(self.converted or self.added or self.removed)


def scaling_of(plan: Plan, prefill: Sequence[Slot], decode: Sequence[Slot]) -> Scaling:
    """A prefill worker too many becomes a decode worker where one is missing: it is there already.

    The newest go first. Slots are in the order in which they were made.
    """
    num_surplus = max(0, len(prefill) - plan.num_prefill)
    num_missing = max(0, plan.num_decode - len(decode))
    num_converted = min(num_surplus, num_missing)
    num_ended = num_surplus - num_converted
    going = prefill[len(prefill) - num_surplus :]
    return Scaling(
        converted=tuple(going[num_ended:]),
        added=(
            *(Role.PREFILL for _ in range(plan.num_prefill - len(prefill))),
            *(Role.DECODE for _ in range(num_missing - num_converted)),
        ),
        removed=(*going[:num_ended], *decode[plan.num_decode :]),
    )
