"""The stages of a run: which weights train, on which levels' losses (paper 3.4).

Without `backbone_steps` a run has one stage, in which every level's loss shapes every weight. With
it a run has the paper's two: the backbone on the top level's loss alone, then the heads of all
levels on the frozen backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from colm_serve.model.layers import PerLevelHead
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig
from colm_serve.training.loss import draw_level_weights


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with one optimizer and one course of the learning rate.

    Attributes:
        first_step: counted from 0.
        end_step: the step after the last.
        trains: "all" weights on all levels, the "backbone" with the top level's head on the top
            level, or the "heads" on all levels.
    """

    first_step: int
    end_step: int
    trains: Literal["all", "backbone", "heads"]

    def level_weights(
        self, config: TrainConfig, generator: np.random.Generator
    ) -> tuple[float, ...]:
        """What each level's loss counts in one micro-batch, lowest level first."""
        lower_levels = 0 if self.trains == "backbone" else config.lower_levels
        num_frozen = config.tuning.frozen_chains if config.tuning else 0
        num_levels = config.model.num_chains - num_frozen
        return (0.0,) * num_frozen + draw_level_weights(num_levels, lower_levels, generator)

    def freeze_others(self, model: ColmModel) -> None:
        """Leave gradients to the weights that this stage trains."""
        assert model.head is not None
        model.requires_grad_(self.trains != "heads")
        model.head.requires_grad_(True)
        if self.trains == "backbone" and isinstance(model.head, PerLevelHead):
            for weight in model.head.weights[:-1]:
                weight.requires_grad_(False)


def stage_at(config: TrainConfig, step: int) -> Stage:
    """The stage that step `step`, counted from 0, belongs to."""
    if config.backbone_steps is None:
        return Stage(0, config.num_steps, "all")
    if step < config.backbone_steps:
        return Stage(0, config.backbone_steps, "backbone")
    return Stage(config.backbone_steps, config.num_steps, "heads")
