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
    """

    def __init__(self, loaded: LoadedModel[ServingModel], page_size: int) -> None:
        self._model = loaded.model
        self._pool = make_pool(loaded, loaded.model.num_chains, page_size)

    def passes(self) -> bool:
        """Whether the model's scores are numbers."""
        segments = [
            Segment((_TOKEN,), 0, level, self._pool.table([level - 1]))
            for level in range(self._model.num_chains, 0, -1)
        ]
        return None not in best_tokens(run_pass(self._model, self._pool, segments).logits_SV)
