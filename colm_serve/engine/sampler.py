"""Choose the next token of each row: greedy, or a draw keyed by (seed, position).

A draw depends on nothing but the row's own scores, rules, seed and position, so a request
continues with the same text on another worker, in another batch, after a restart.

Shapes: B rows, R rows that want logprobs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colm_serve.core import MAX_LOGPROBS, Logprobs, SamplingParams, TokenLogprob
from colm_serve.engine.draws import distribution, draw
from colm_serve.engine.logits_processor import LogitsProcessor


@dataclass(frozen=True)
class Sampled:
    """A token id a row, and by row the logprobs of those that asked for them."""

    tokens: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)


def sample(
    logits_BV: Tensor,
    sampling: Sequence[SamplingParams],
    positions: Sequence[int],
    processors: Sequence[LogitsProcessor | None] | None = None,
) -> Sampled:
    """Choose each row's token.

    Args:
        logits_BV: [B, V] scores.
        sampling: each row's parameters.
        positions: the position in its sequence that each row's new token will have.
        processors: each row's rules, where it has some; None: no row has.
    """
    chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
    processors = [None] * len(chosen) if processors is None else processors
    rows = zip(sampling, positions, processors, strict=True)
    for row, (params, position, processor) in enumerate(rows):
        if processor is None and params.temperature == 0:
            continue
        logits_V = logits_BV[row] if processor is None else processor.process(logits_BV[row])
        if params.temperature > 0:
            chosen[row] = draw(distribution(logits_V, params), params, position)
        else:
            chosen[row] = int(logits_V.argmax())
    return Sampled(chosen, _logprobs(logits_BV, sampling, chosen))


def _logprobs(
    logits_BV: Tensor, sampling: Sequence[SamplingParams], chosen: Sequence[int]
) -> dict[int, Logprobs]:
    rows = [row for row, params in enumerate(sampling) if params.logprobs is not None]
    if not rows:
        return {}
    logprobs_RV = torch.log_softmax(logits_BV[rows].float(), dim=-1)
    # The same number for all, for ties to fall as they would without the other rows.
    values, token_ids = logprobs_RV.topk(min(MAX_LOGPROBS, logprobs_RV.shape[-1]), dim=-1)
    wanted = torch.tensor([[chosen[row]] for row in rows], device=logprobs_RV.device)
    own = logprobs_RV.gather(1, wanted).flatten().tolist()
    found = zip(rows, own, token_ids.tolist(), values.tolist(), strict=True)
    return {
        row: Logprobs(
            chosen=TokenLogprob(chosen[row], logprob),
            top=tuple(map(TokenLogprob, ids[: sampling[row].logprobs], best)),
        )
        for row, logprob, ids, best in found
    }
