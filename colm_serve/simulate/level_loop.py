"""Moves running requests between levels, as `router.level_loop`, on the virtual clock."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from colm_serve.core import DecodeStatus, Member
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.placing.level_moves import LEAST_SHARE, LevelMover, Row, step_limit_s
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
            if running and not self._is_calm(member, running, now):
                self._move_at(member, running, now)

    def _is_calm(self, member: Member, running: dict[str, VirtualRequest], now: float) -> bool:
        """Whether nothing could be planned: all run at their highest level, and well in time."""
        step_s = self._decode[member].step_s
        return all(
            request.level == request.max_level
            and (request.tpot_s is None or step_s <= LEAST_SHARE * request.tpot_s)
            and step_s * request.traced.num_output_tokens <= request.deadline - now
            for request in running.values()
        )

    def _move_at(self, member: Member, running: dict[str, VirtualRequest], now: float) -> None:
        status = self._view.status_of(member)
        if not isinstance(status, DecodeStatus):
            return
        worker = self._decode[member]
        rows = [_row(request, worker, now) for request in running.values()]
        mover = self._movers.setdefault(member, LevelMover(self._moves_per_s))
        for move in mover.plan(now, rows, status.step_cost, status.max_rows):
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
    first_at = math.inf if sequence.first_token_at is None else sequence.first_token_at
    return Row(
        request_id=request.request_id,
        level=request.level,
        min_level=request.sla.min_level,
        max_level=request.max_level,
        num_attended=request.num_prompt + num_made,
        step_limit_s=step_limit_s(
            tpot_s=request.tpot_s,
            decode_s=max(0.0, now - first_at),
            num_done=max(0, num_made - 1),
            num_left=sequence.max_tokens - num_made,
            remaining_s=request.deadline - now,
        ),
        weight=request.sla.weight,
    )
