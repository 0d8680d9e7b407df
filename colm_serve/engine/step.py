"""One pass of the model over tokens of many sequences, each at its own level.

Decode rows, verified drafts, prompts to score and prompts to store are the same thing to it.

Shapes: T rows, S scored rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.paged import PagedContext, Span
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import level_rows


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence whose K and V are not in the cache yet.

    The next token is to be scored after each of the last `num_scored`: 1 for a decode row,
    1 + drafts for a verification, 0 for tokens of which only K and V are wanted, at level 1.
    """

    tokens: Sequence[int]
    start: int  # position of the first of them
    level: int
    table: BlockTable
    num_scored: int = 1

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Scores:
    """Next-token scores of a pass's scored rows, in the order of its segments.

    `x_SD` are the rows' normalised hidden states. The first chains of a row are the lower level's
    own, so `model.logits(x_SD[rows], (len(rows),) * level)` scores them at a lower level too.
    """

    logits_SV: Tensor
    x_SD: Tensor


@torch.inference_mode()
def run_pass(model: ServingModel, pool: KvPool, segments: Sequence[Segment]) -> Scores:
    """Put K and V of every segment's tokens into its pages and score the rows that want it.

    In a pass that scores nothing the last layer stops after K and V (paper 4.4). In a mixed one it
    runs whole, also for rows that nobody scores: at most a layer's share of their work.

    Args:
        model: must hold every level asked for.
        segments: at least one, sorted by level, highest first; chain i then works on a prefix of
            their rows. Those without scores stand last, where the others need no copy.
    """
    lengths = [len(segment.tokens) for segment in segments]
    first_rows = [0, *accumulate(lengths)]
    spans = [
        Span(segment.table, first_row, length, segment.start, segment.level)
        for segment, first_row, length in zip(segments, first_rows, lengths, strict=False)
    ]
    device = model.device
    tokens = torch.tensor([t for segment in segments for t in segment.tokens], device=device)
    positions = torch.tensor(
        [p for segment in segments for p in range(segment.start, segment.stop)], device=device
    )
    context = PagedContext(model.config, pool, spans)
    num_rows = level_rows([span.level for span in spans for _ in range(span.num_rows)])
    scored = [
        row
        for segment, end in zip(segments, first_rows[1:], strict=True)
        for row in range(end - segment.num_scored, end)
    ]
    if not scored:
        assert len(num_rows) == 1, "tokens without scores are at level 1"
        model.prefill(tokens, positions, context)
        empty = torch.empty(0, device=device)
        return Scores(empty.view(0, model.config.vocab_size), empty.view(0, model.config.d_model))
    x_TD = model(tokens, positions, num_rows, context)
    if scored[-1] == len(scored) - 1:
        x_SD = x_TD[: len(scored)]
    else:
        x_SD = x_TD[torch.tensor(scored, device=device)]
    scored_levels = [s.level for s in segments for _ in range(s.num_scored)]
    return Scores(model.logits(x_SD, level_rows(scored_levels)), x_SD)
