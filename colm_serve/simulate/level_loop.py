"""Moves running requests between levels, as `router.level_loop`, on the virtual clock."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from colm_serve.core import DecodeStatus, Member
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.placing.batch import Row
from colm_serve.router.placing.latency_model import upper_limit_s
from colm_serve.router.placing.level_moves import LEAST_SHARE, LevelMover, mean_limit_s
from colm_serve.simulate.decode import VirtualDecodeWorker
from colm_serve.simulate.running import VirtualRequest


class VirtualLevelLoop:
    """Plans the moves at every decode worker that has requests which may move."""

    def __init__(
        self, view: ClusterView, decode: Mapping[Member, VirtualDecodeWorker], moves_per_s: float
    ) -> None:
        self.num_moves = 0
        self._view = view
        self._decode = decode
        self._moves_per_s = moves_per_s
        self._running: dict[Member, dict[str, VirtualRequest]] = defaultdict(dict)
        self._movers: dict[Member, LevelMover] = {}

    def add(self, member: Member, request: VirtualRequest) -> None:
        """A worker has admitted a request."""
        self._running[member][request.request_id] = request

    def remove(self, member: Member, request: VirtualRequest) -> None:
        """The request is over there."""
        self._running[member].pop(request.request_id, None)

    def move(self, now: float) -> None:
        """Plan and make the moves that are due now."""
        for member, running in self._running.items():
            status = self._view.status_of(member)
            if not isinstance(status, DecodeStatus):
                continue
            if self._is_calm(member, status, running, now):
                self._view.set_outlook(member, None)
            else:
                self._move_at(member, status, running, now)

    def _is_calm(
        self,
        member: Member,
        status: DecodeStatus,
        running: dict[str, VirtualRequest],
        now: float,
    ) -> bool:
        """Whether nothing could be planned: all run at their highest level, and well in time."""
        step_s = self._decode[member].step_s
        highest, limit_s = 1, math.inf
        for request in running.values():
            if request.level < request.max_level:
                return False
            if step_s * request.traced.num_output_tokens > request.deadline - now:
                return False
            highest = max(highest, request.level)
            if request.tpot_s is not None:
                limit_s = min(limit_s, LEAST_SHARE * request.tpot_s)
        return step_s <= upper_limit_s(limit_s, highest, status.step_cost)

    def _move_at(
        self,
        member: Member,
        status: DecodeStatus,
        running: dict[str, VirtualRequest],
        now: float,
    ) -> None:
        worker = self._decode[member]
        rows = [_row(request, worker, now) for request in running.values()]
        mover = self._movers.setdefault(member, LevelMover(self._moves_per_s))
        moves, outlook = mover.plan(now, rows, status.step_cost, status.max_rows)
        self._view.set_outlook(member, outlook)
        for move in moves:
            request = running[move.request_id]
            request.level = move.level
            self.num_moves += 1
            self._view.move(move.request_id, member, move.level)
            if request.sequence is not None:
                worker.move_level(request.sequence, move.level)


def _row(request: VirtualRequest, worker: VirtualDecodeWorker, now: float) -> Row:
    """What its level is to be decided on; `router.running` has the rule."""
    sequence = request.sequence
    assert sequence is not None, "a request that a worker has admitted has a sequence there"
    num_made = worker.num_output(sequence)
    num_left = sequence.max_tokens - num_made
    first_at = math.inf if sequence.first_token_at is None else sequence.first_token_at
    return Row(
        request_id=request.request_id,
        level=request.level,
        min_level=request.sla.min_level,
        max_level=request.max_level,
        num_attended=request.num_prompt + num_made,
        num_left=num_left,
        mean_limit_s=mean_limit_s(
            tpot_s=request.tpot_s,
            decode_s=max(0.0, now - first_at),
            num_done=max(0, num_made - 1),
            num_left=num_left,
            remaining_s=request.deadline - now,
        ),
        tpot_s=request.tpot_s,
        weight=request.sla.weight,
    )
