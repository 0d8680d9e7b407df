"""Choose next tokens: greedy, or draws keyed by (seed, position); and tell which drafts hold.

A token depends on nothing but its row's own scores, rules, seed and position, so a request
continues with the same text on another worker, in another batch, after a restart, and whatever
is drafted for it.

Shapes: B rows, S scored rows, R rows that want logprobs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from colm_serve.core import MAX_LOGPROBS, Logprobs, SamplingParams, TokenLogprob
from colm_serve.engine.draws import distribution, draw, draw_speculated
from colm_serve.engine.failed import Failed, attempt
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.errors import RowFailed


@dataclass(frozen=True)
class Sampled:
    """The tokens of a run, and the logprobs of each if they were asked for."""

    tokens: list[int]
    logprobs: list[Logprobs] | None = None


@dataclass(frozen=True)
class Run:
    """One sequence's scored rows: after its last token, then after each of its drafts.

    `position` is the one in the sequence that the token after the first row will have. With
    `drafter_logits_SV`, the drafter's scores of the same rows, a sampled token is a speculated
    draw. Whether a request has them must not depend on what is drafted, for its text not to.
    """

    sampling: SamplingParams
    position: int
    processor: LogitsProcessor | None = None
    drafts: tuple[int, ...] = ()
    drafter_logits_SV: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return 1 + len(self.drafts)

    def can_choose(self, index: int) -> bool:
        """Whether the rules for the token after the first `index` drafts are at hand."""
        return self.processor is None or self.processor.can_follow(self.drafts[:index])

    def choose(self, index: int, logits_V: Tensor, best: int) -> int:
        """The token after the first `index` drafts, given its scores and the best of them.

        Raises:
            RowFailed: the rules leave no token to choose, or scores that are no numbers.
        """
        token = self._choose(index, logits_V, best)
        if not 0 <= token < len(logits_V):
            raise RowFailed(f"token {token} was chosen of a vocabulary of {len(logits_V)}")
        return token

    def _choose(self, index: int, logits_V: Tensor, best: int) -> int:
        greedy = self.sampling.temperature == 0
        if greedy and self.processor is None:
            return best
        logits_V = self._process(index, logits_V)
        if greedy:
            return int(logits_V.argmax())
        p_V, position = distribution(logits_V, self.sampling), self.position + index
        if self.drafter_logits_SV is None:
            return draw(p_V, self.sampling, position)
        drafter_V = self._process(index, self.drafter_logits_SV[index])
        q_V = distribution(drafter_V, self.sampling)
        return draw_speculated(p_V, q_V, self.sampling, position)

    def _process(self, index: int, logits_V: Tensor) -> Tensor:
        if self.processor is not None:
            logits_V = self.processor.process(logits_V, self.drafts[:index])
        if None in best_tokens(logits_V[None]):
            raise RowFailed("its sampling rules leave no score, or one that is not a number")
        return logits_V


def best_tokens(logits_SV: Tensor) -> list[int | None]:
    """The best token of each row; None where there is no telling.

    That is where a score is NaN or inf, or where all are -inf: this is what tokens have that are
    ruled out. The greatest score shows each of these, and its place comes with it.
    """
    greatest, best = logits_SV.max(dim=-1)
    is_known = greatest.isfinite().tolist()
    return [b if known else None for b, known in zip(best.tolist(), is_known, strict=True)]


def no_numbers() -> Failed:
    """The model itself does not say which token is best."""
    error = RowFailed("the model's scores after this text are not all numbers")
    return Failed(error, is_of_model=True)


def sample(logits_SV: Tensor, runs: Sequence[Run]) -> list[Sampled | Failed]:
    """Each run's tokens: the drafts as far as the model makes them too, then one of its own.

    They end where the rules for the next are not at hand, perhaps before the first. A run that
    fails does so alone.

    Args:
        logits_SV: [S, V] scores of all runs' rows, one run after the other.
        runs: with `num_rows` rows each.
    """
    best = best_tokens(logits_SV)
    bounds = pairwise([0, *accumulate(run.num_rows for run in runs)])
    return [
        attempt(partial(_sample_run, run, logits_SV[first:end], best[first:end]))
        for run, (first, end) in zip(runs, bounds, strict=True)
    ]


def draft(logits_BV: Tensor, runs: Sequence[Run]) -> list[int | Failed | None]:
    """The drafter's token after each run's drafts, given its own scores there, [B, V].

    None where the rules for it are not at hand.
    """
    return [
        no_numbers() if b is None else attempt(partial(_draft_run, run, logits_V, b))
        for run, logits_V, b in zip(runs, logits_BV, best_tokens(logits_BV), strict=True)
    ]


def _draft_run(run: Run, logits_V: Tensor, best: int) -> int | None:
    index = len(run.drafts)
    return run.choose(index, logits_V, best) if run.can_choose(index) else None


def _sample_run(run: Run, logits_SV: Tensor, best_S: Sequence[int | None]) -> Sampled | Failed:
    tokens: list[int] = []
    for expected in (*run.drafts, None):
        index = len(tokens)
        if not run.can_choose(index):
            break
        # What follows a draft that does not hold is not looked at: it is not of this text.
        best = best_S[index]
        if best is None:
            return no_numbers()
        tokens.append(run.choose(index, logits_SV[index], best))
        if tokens[-1] != expected:
            break
    num_top = run.sampling.logprobs
    if num_top is None or not tokens:
        return Sampled(tokens)
    return Sampled(tokens, logprobs_of(logits_SV[: len(tokens)], tokens, num_top))


def logprobs_of(logits_RV: Tensor, chosen: Sequence[int], num_top: int) -> list[Logprobs]:
    """The logprobs of each row's token and of its `num_top` likeliest ones, unfiltered."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    # The same number whatever is asked, for ties to fall the same way.
    values, token_ids = logprobs_RV.topk(min(MAX_LOGPROBS, logprobs_RV.shape[-1]), dim=-1)
    wanted = torch.tensor(chosen, device=logprobs_RV.device)[:, None]
    own = logprobs_RV.gather(1, wanted).flatten().tolist()
    return [
        Logprobs(
            chosen=TokenLogprob(token, logprob),
            top=tuple(map(TokenLogprob, ids[:num_top], best)),
        )
        for token, logprob, ids, best in zip(
            chosen, own, token_ids.tolist(), values.tolist(), strict=True
        )
    ]
