"""How many tokens to draft for each request: pure, no clock.

A lower level drafts `g` tokens, one pass at the request's own level verifies them. With an
acceptance rate `a` and a draft that costs the share `c` of a step, that multiplies the speed by
`speedup(a, g, c)`. Here `c`, and what the further rows of a verification cost, come from the
measured `StepCost`, the rows of the batch and the tokens that they attend to; `a` from the
request's own verifications.

Not done, and why. A cascade (level 1 drafts for level 2, that for level 4) gains when level 2 is
much more often right than level 1. In the 1B shape with chains 8:8:8:8 levels 1 and 2 read 0.155
and 0.37 of the weights. With acceptances of 0.8 (1 for 4), 0.9 (2 for 4) and 0.88 (1 for 2) the
formula gives 2.08 without and 2.09 with a cascade; with 0.6, 0.8 and 0.75 1.50 and 1.57; with the
bundled model's 0.58, 0.79 and 0.67 at temperature 0.8 1.46 and 1.50: less than its further passes
and rows cost. Chain 1's activations of drafted rows are not kept for the verification: the last
draft has none, so that pass reads chain 1's weights all the same, and at the few rows at which
drafting pays reading is what takes the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colm_serve.core import StepCost

#: A plan has to promise so much more tokens a second than none.
_MARGIN = 1.03
#: What a new estimate counts for and the most it remembers, in verified drafts.
_PRIOR_TRIALS, _MEMORY_TRIALS = 4.0, 48.0
#: A request whose drafts do not pay tries again after so many turns, with this hope and so many.
_FIRST_WAIT, _LONGEST_WAIT = 64, 512
_HOPE, _PROBE_DRAFTS = 0.95, 2
_PROBE_TRIALS = 2.0


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """Tokens of a verification on average: (1 - a^(g+1)) / (1 - a)."""
    return sum(acceptance**i for i in range(num_drafts + 1))


def speedup(acceptance: float, num_drafts: int, draft_cost: float) -> float:
    """How many times plain decoding's speed: S = [(1 - a^(g+1)) / (1 - a)] / (1 + g c).

    Args:
        draft_cost: c, a draft step's time as a share of a step's at the request's own level.
    """
    return expected_tokens(acceptance, num_drafts) / (1 + num_drafts * draft_cost)


@dataclass(frozen=True)
class Candidate:
    """A request in the next pass that may have up to `max_drafts` tokens drafted."""

    level: int
    num_cached: int
    acceptance: float
    max_drafts: int


class Load:
    """What a pass holds, by chain: its rows and the tokens that they attend to."""

    def __init__(self, num_levels: int) -> None:
        self._rows = [0] * num_levels
        self._cached = [0] * num_levels

    def add(self, level: int, num_cached: int, num_rows: int = 1) -> None:
        """Rows at `level` that attend to `num_cached` tokens each."""
        for chain in range(level):
            self._rows[chain] += num_rows
            self._cached[chain] += num_rows * num_cached

    def seconds(self, cost: StepCost) -> float:
        return cost.step_s(self._rows, self._cached)


class _Turn:
    """A turn being planned: drafting passes, the pass that verifies, the tokens to expect."""

    def __init__(self, cost: StepCost, draft_level: int, load: Load, num_tokens: int) -> None:
        self._cost = cost
        self._draft_level = draft_level
        self._load = load
        self._drafting: list[Load] = []
        self._num_tokens = float(num_tokens)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        passes = (self._load, *self._drafting)
        return self._num_tokens / sum(load.seconds(self._cost) for load in passes)

    def add_draft(self, candidate: Candidate, depth: int, number: int = 1) -> None:
        """One more draft, or with -1 one fewer: the candidate's `depth`-th."""
        if len(self._drafting) < depth:
            self._drafting.append(Load(self._draft_level))
        self._drafting[depth - 1].add(self._draft_level, candidate.num_cached, number)
        self._load.add(candidate.level, candidate.num_cached, number)
        self._num_tokens += number * candidate.acceptance**depth


def plan_drafts(
    cost: StepCost, draft_level: int, load: Load, num_tokens: int, candidates: Sequence[Candidate]
) -> list[int]:
    """Drafts of each candidate with which the batch makes the most tokens a second.

    Each further draft of a request is accepted less often than the one before. So, depth by
    depth, those likeliest to be accepted are taken, as long as the speed grows.

    Args:
        load: the next pass without drafts, candidates included; drafts are added to it.
        num_tokens: how many tokens that pass makes.

    Returns:
        A number for each candidate, all 0 unless the gain is worth it.
    """
    if not candidates:
        return []
    turn = _Turn(cost, draft_level, load, num_tokens)
    plain_speed = speed = turn.speed
    plan = [0] * len(candidates)
    likeliest = sorted(range(len(candidates)), key=lambda i: -candidates[i].acceptance)
    depth = 0
    while True:
        depth += 1
        ready = [i for i in likeliest if plan[i] == depth - 1 < candidates[i].max_drafts]
        num_chosen = 0
        for number, i in enumerate(ready, start=1):
            turn.add_draft(candidates[i], depth)
            if turn.speed > speed:
                speed, num_chosen = turn.speed, number
        if not num_chosen:
            return plan if speed > _MARGIN * plain_speed else [0] * len(candidates)
        for i in ready[:num_chosen]:
            plan[i] = depth
        for i in ready[num_chosen:]:
            turn.add_draft(candidates[i], depth, -1)


class AcceptanceRate:
    """The share of drafts that verifications accepted lately; `prior` until there are some.

    Each draft up to the first rejected one is a trial; those behind it have not been tried.
    """

    def __init__(self, prior: float) -> None:
        self._num_trials = _PRIOR_TRIALS
        self._num_accepted = prior * _PRIOR_TRIALS

    @property
    def value(self) -> float:
        return self._num_accepted / self._num_trials

    def record(self, num_drafts: int, num_accepted: int) -> None:
        self._num_trials += min(num_drafts, num_accepted + 1)
        self._num_accepted += num_accepted
        self.forget(_MEMORY_TRIALS)

    def forget(self, num_trials: float) -> None:
        """Let what is known count for `num_trials` at most."""
        kept = min(1.0, num_trials / self._num_trials)
        self._num_trials *= kept
        self._num_accepted *= kept


class DraftController:
    """A request's drafts at one level: what to expect, and when to try again if they do not pay.

    The longer they do not pay, the rarer it is tried. Turns are counted by the worker, so that
    requests try in the same turns and share the drafting passes.
    """

    def __init__(self, level: int, prior: float) -> None:
        self.level = level
        self._rate = AcceptanceRate(prior)
        self._is_off = False
        self._wait = _FIRST_WAIT

    def is_probe(self, turn: int) -> bool:
        return self._is_off and turn % self._wait == 0

    def candidate(self, turn: int, num_cached: int, max_drafts: int) -> Candidate:
        """What to plan the turn with: the estimate, or in a probe the hope that it is wrong."""
        if self.is_probe(turn):
            hope = max(_HOPE, self._rate.value)
            return Candidate(self.level, num_cached, hope, min(_PROBE_DRAFTS, max_drafts))
        return Candidate(self.level, num_cached, self._rate.value, max_drafts)

    def record_plan(self, turn: int, num_drafts: int) -> None:
        if not self.is_probe(turn):
            self._is_off = num_drafts == 0
        if not self._is_off:
            self._wait = _FIRST_WAIT

    def record(self, num_drafts: int, num_accepted: int) -> None:
        """A verification of `num_drafts` drafts, 1 or more, accepted the first `num_accepted`."""
        if self._is_off:
            # What was known is old; one probe may overturn it.
            self._rate.forget(_PROBE_TRIALS)
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._rate.record(num_drafts, num_accepted)
