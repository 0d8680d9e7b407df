"""Tells a model that is broken from a request that is."""

from __future__ import annotations

from colm_serve.engine.loading import make_pool
from colm_serve.engine.sampler import best_tokens
from colm_serve.engine.step import Segment, run_pass
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.serving import ServingModel

_TOKEN = 0


class SelfTest:
    """One known token, scored at every level, on pages of its own.

    Nothing that a client sent takes part, so no request can make a worker fail it; and every
    matrix of the model does, so a NaN in one of them shows, whichever rows have met it so far.

    Args:
        with_head: without, the model only prefills: nothing is scored.
    """

    def __init__(
        self, loaded: LoadedModel[ServingModel], page_size: int, *, with_head: bool = True
    ) -> None:
        self._model = loaded.model
        num_levels = loaded.model.num_chains if with_head else 1
        self._pool = make_pool(loaded, num_levels, page_size)
        self._segments = [
            Segment((_TOKEN,), 0, level, self._pool.table([level - 1]), int(with_head))
            for level in range(num_levels, 0, -1)
        ]

    def passes(self) -> bool:
        """Whether what the model makes are numbers."""
        scores = run_pass(self._model, self._pool, self._segments)
        return None not in best_tokens(scores.logits_SV) and all(
            self._pool.are_numbers(segment.table, 0, 1) for segment in self._segments
        )
