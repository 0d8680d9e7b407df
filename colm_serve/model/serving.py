"""What the engine needs of a model that serves, whatever runs it.

Shapes: T rows (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from colm_serve.model.config import ColmConfig
from colm_serve.model.paged import PagedContext


class ServingModel(Protocol):
    """The first `num_chains` chains of a CoLM over paged keys and values."""

    config: ColmConfig
    num_chains: int

    @property
    def device(self) -> torch.device:
        """Where token ids and positions are expected."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """What keys and values are made in."""

    def __call__(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        num_rows: Sequence[int],
        context: PagedContext,
    ) -> Tensor:
        """Normalised hidden states [T, D]; see `ColmModel.forward`.

        What a row has in columns beyond its level is not specified.
        """

    def prefill(self, token_ids_T: Tensor, positions_T: Tensor, context: PagedContext) -> None:
        """Chain 1's keys and values alone; see `ColmModel.prefill`."""

    def logits(self, x_TD: Tensor, num_rows: Sequence[int]) -> Tensor:
        """[T, V], each row at its own level; see `ColmModel.logits`."""
