"""One decode step: every running sequence's next token, at its own level, in one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colm_serve.core import SamplingParams, StepCost
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Sampled, sample
from colm_serve.kv.pool import BlockTable, KvPool
from colm_serve.model.paged import PagedContext, Span
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import level_rows


@dataclass(frozen=True)
class StepRow:
    """One sequence's last known token, whose K and V are not in the cache yet."""

    token: int
    position: int
    level: int
    table: BlockTable
    sampling: SamplingParams
    processor: LogitsProcessor | None = None


@torch.inference_mode()
def run_step(model: ServingModel, pool: KvPool, rows: Sequence[StepRow]) -> Sampled:
    """The next token of each row; each row's own K and V are put into its pages.

    Args:
        model: must hold every level asked for.
        rows: sorted by level, highest first; chain i then works on a prefix of them.
    """
    num_rows = level_rows([row.level for row in rows])
    spans = [Span(row.table, i, 1, row.position, row.level) for i, row in enumerate(rows)]
    device = model.device
    tokens = torch.tensor([row.token for row in rows], device=device)
    positions = torch.tensor([row.position for row in rows], device=device)
    x_TD = model(tokens, positions, num_rows, PagedContext(model.config, pool, spans))
    logits_TV = model.logits(x_TD, num_rows)
    return sample(
        logits_TV,
        [row.sampling for row in rows],
        [row.position + 1 for row in rows],
        [row.processor for row in rows],
    )


def measure_step_cost(
    model: ServingModel, pool: KvPool, max_rows: int, repeats: int = 5
) -> StepCost:
    """Time steps of one row and of several at each level; the differences are the chains' costs.

    Uses the pool's first page as scratch: call it before anything is cached.
    """
    table = pool.table([0])
    greedy = SamplingParams(max_tokens=1, temperature=0)
    many = max(2, min(8, max_rows))
    one_s, many_s = [0.0], [0.0]
    for level in range(1, model.num_chains + 1):
        for num_rows, seconds in ((1, one_s), (many, many_s)):
            rows = [StepRow(0, 0, level, table, greedy)] * num_rows
            run_step(model, pool, rows)
            samples = []
            for _ in range(repeats):
                begin = time.perf_counter()
                run_step(model, pool, rows)
                samples.append(time.perf_counter() - begin)
            # A level costs at least what the level below it does; noise may say otherwise.
            seconds.append(max(seconds[-1], statistics.median(samples)))
    levels = range(1, model.num_chains + 1)
    chain_s = [one_s[k] - one_s[k - 1] for k in levels]
    per_level = [max(0.0, many_s[k] - one_s[k]) / (many - 1) for k in range(len(one_s))]
    row_s = [max(0.0, per_level[k] - per_level[k - 1]) for k in levels]
    return StepCost(tuple(chain_s), tuple(row_s))
