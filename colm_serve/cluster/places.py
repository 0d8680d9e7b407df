"""Where slots stand: Ray's placement groups, and the places in them that are free again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from colm_serve.cluster.placement import Slot
from colm_serve.errors import Unavailable


class Places:
    """One group for the slots that a cluster begins with, and one for each further place.

    The places of the first are given back as one: those that have been left wait for others.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._groups: dict[Slot, PlacementGroup] = {}
        self._left: list[Slot] = []

    async def reserve(self, slots: Sequence[Slot]) -> None:
        """A group for these; raises Unavailable when Ray has not the resources in time."""
        wanted = [slot.resources for slot in slots]
        group = placement_group(wanted, strategy="PACK")
        try:
            async with asyncio.timeout(self._timeout_s):
                await group.ready()
        except TimeoutError as error:
            remove_placement_group(group)
            raise Unavailable(
                f"Ray could not place {len(wanted)} actors within {self._timeout_s} s: wanted "
                f"{wanted}, the cluster has {ray.cluster_resources()}"
            ) from error
        self._groups.update(dict.fromkeys(slots, group))

    async def reserve_further(self, slot: Slot) -> Slot:
        """The slot in a place that another has left, or else in a new one; raises as `reserve`."""
        left = next((s for s in self._left if s.resources == slot.resources), None)
        if left is None:
            await self.reserve([slot])
            return slot
        self._left.remove(left)
        slot = replace(slot, bundle=left.bundle)
        self.hand_over(left, slot)
        return slot

    def strategy(self, slot: Slot) -> PlacementGroupSchedulingStrategy:
        """What puts an actor into the slot's place."""
        return PlacementGroupSchedulingStrategy(
            placement_group=self._groups[slot], placement_group_bundle_index=slot.bundle
        )

    def hand_over(self, slot: Slot, successor: Slot) -> None:
        """The place of one slot is another's."""
        self._groups[successor] = self._groups.pop(slot)

    def leave(self, slot: Slot) -> None:
        """Nothing runs in the slot any more."""
        if list(self._groups.values()).count(self._groups[slot]) > 1:
            self._left.append(slot)
        else:
            remove_placement_group(self._groups.pop(slot))

    def close(self) -> None:
        """Give everything back."""
        for group in set(self._groups.values()):
            remove_placement_group(group)
