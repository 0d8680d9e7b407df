"""Speculation in a decode worker's turn: a lower level drafts, the turn's pass verifies.

The drafter writes K and V of its drafts into the sequence's own pages, where the verification
writes the same ones again; those of rejected drafts stand behind `num_computed`, so nobody reads
them, and the next pass writes over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from colm_serve.config import SpeculationConfig
from colm_serve.core import StepCost
from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.decode_worker.turn import Chunk, Row
from colm_serve.engine.failed import Failed
from colm_serve.engine.sampler import Run, Sampled, draft, sample
from colm_serve.engine.speculation import AcceptanceRate, DraftController, Load, plan_drafts
from colm_serve.engine.step import Scores, Segment, run_pass
from colm_serve.kv.pool import KvPool
from colm_serve.model.serving import ServingModel

#: The acceptance rate to begin with, before any draft was verified.
_FIRST_GUESS = 0.6
#: While nothing is drafted: planning takes a tenth of a small model's step.
_TURNS_BETWEEN_PLANS = 4


@dataclass(frozen=True)
class Step:
    """A row of the turn: what is computed for it, and how its tokens are chosen."""

    row: Row
    segment: Segment
    run: Run

    def with_draft(self, token: int) -> Step:
        segment, run = self.segment, self.run
        return replace(
            self,
            segment=replace(
                segment, tokens=(*segment.tokens, token), num_scored=segment.num_scored + 1
            ),
            run=replace(run, drafts=(*run.drafts, token)),
        )

    def drafting(self, level: int) -> Segment:
        """The last token alone, for the drafter to score the next."""
        segment = self.segment
        return Segment(segment.tokens[-1:], segment.stop - 1, level, segment.table)


class Speculation:
    """Drafts for rows above the drafter's level, as many as pay; counts what held.

    Args:
        config: when not enabled, no level is above the drafter's.
    """

    def __init__(
        self, model: ServingModel, pool: KvPool, cost: StepCost, config: SpeculationConfig
    ) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._model = model
        self._pool = pool
        self._cost = cost
        self._level = config.draft_level if config.enabled else model.num_chains
        self._is_for_sampled = config.sampled
        self._max_drafts = config.max_drafts
        self._turn = 0
        self._rates: defaultdict[int, AcceptanceRate] = defaultdict(
            lambda: AcceptanceRate(_FIRST_GUESS)
        )
        self._controllers: dict[Sequence, DraftController] = {}

    @torch.inference_mode()
    def draft(self, steps: Seq[Step]) -> list[Step]:
        """The steps with as many drafts as their rows are to verify, unless the text ends before.

        The token that would end it is left to the verification, which makes one more than the
        drafts anyway: so nothing follows an end. Likewise where drafting fails: the verification
        tells whether the row does.
        """
        steps = list(steps)
        for depth in range(max((step.row.num_drafts for step in steps), default=0)):
            drafting = [
                i
                for i, step in enumerate(steps)
                if self._drafts_for(step.row.sequence, step.row.level)
                and step.row.num_drafts > depth == len(step.run.drafts)
            ]
            if not drafting:
                break
            segments = [steps[i].drafting(self._level) for i in drafting]
            scores = run_pass(self._model, self._pool, segments)
            tokens = draft(scores.logits_SV, [steps[i].run for i in drafting])
            for i, token in zip(drafting, tokens, strict=True):
                if token is None or isinstance(token, Failed):
                    continue
                if token not in steps[i].row.sequence.ending_token_ids:
                    steps[i] = steps[i].with_draft(token)
        return steps

    @torch.inference_mode()
    def sample(self, steps: Seq[Step], scores: Scores) -> list[Sampled | Failed]:
        """Each step's tokens, from the scores of the pass that verified its drafts.

        Draws of requests that are drafted for are speculated ones, drafts or none: see `Run`.
        """
        runs = [step.run for step in steps]
        drawn = [
            i
            for i, step in enumerate(steps)
            if step.run.sampling.temperature > 0
            and self._drafts_for(step.row.sequence, step.row.level)
        ]
        if drawn:
            first_rows = [0, *accumulate(run.num_rows for run in runs)]
            rows = [row for i in drawn for row in range(first_rows[i], first_rows[i + 1])]
            logits_SV = self._model.logits(scores.x_SD[rows], (len(rows),) * self._level)
            parts = logits_SV.split([runs[i].num_rows for i in drawn])
            for i, part_SV in zip(drawn, parts, strict=True):
                runs[i] = replace(runs[i], drafter_logits_SV=part_SV)
        return sample(scores.logits_SV, runs)

    def learn(self, steps: Seq[Step], sampled: Seq[object], chunks: Seq[Chunk]) -> None:
        """Note which drafts held, and set how many each sequence has in its next step."""
        self._turn += 1
        if self._turn % _TURNS_BETWEEN_PLANS and not any(s.row.sequence.num_drafts for s in steps):
            return
        running = []
        load = Load(self._model.num_chains)
        for step, made in zip(steps, sampled, strict=True):
            if not isinstance(made, Sampled):
                continue
            self._record(step, num_accepted=len(made.tokens) - 1)
            sequence = step.row.sequence
            if sequence.stage is Stage.RUNNING:
                running.append(sequence)
                load.add(sequence.level, len(sequence.tokens))
        for chunk in chunks:
            if chunk.sequence.stage is Stage.PREFILLING:  # The next pass has one more of its.
                load.add(chunk.level, 0, chunk.num_tokens)
        self._plan(running, load)

    def forget(self, sequence: Sequence) -> None:
        self._controllers.pop(sequence, None)

    def _drafts_for(self, sequence: Sequence, level: int) -> bool:
        """A sampled text depends on this, so it must not depend on load."""
        is_greedy = sequence.request.sampling.temperature == 0
        return level > self._level and (is_greedy or self._is_for_sampled)

    def _record(self, step: Step, num_accepted: int) -> None:
        num_drafts, sequence, level = len(step.run.drafts), step.row.sequence, step.row.level
        if num_drafts:
            self.num_drafted += num_drafts
            self.num_accepted += num_accepted
            self._rates[level].record(num_drafts, num_accepted)
            if sequence.stage is Stage.RUNNING:
                self._controller(sequence, level).record(num_drafts, num_accepted)

    def _plan(self, running: Seq[Sequence], load: Load) -> None:
        able = [s for s in running if self._drafts_for(s, s.level)]
        controllers = [self._controller(sequence, sequence.level) for sequence in able]
        candidates = [
            controller.candidate(self._turn, len(sequence.tokens), self._max_drafts)
            for sequence, controller in zip(able, controllers, strict=True)
        ]
        plan = plan_drafts(self._cost, self._level, load, len(running), candidates)
        for sequence in running:
            sequence.num_drafts = 0
        for sequence, controller, num_drafts in zip(able, controllers, plan, strict=True):
            sequence.num_drafts = num_drafts
            controller.record_plan(self._turn, num_drafts)

    def _controller(self, sequence: Sequence, level: int) -> DraftController:
        """The sequence's own at this level; one that is new knows what held for others."""
        known = self._controllers.get(sequence)
        if known is None or known.level != level:
            known = self._controllers[sequence] = DraftController(level, self._rates[level].value)
        return known
