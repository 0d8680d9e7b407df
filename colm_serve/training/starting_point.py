"""What a run begins with: random weights, or another model's."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.model.folder import ModelFolder
from colm_serve.model.initial import initial_model
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig


@dataclass(frozen=True)
class StartingPoint:
    """A run before its first step.

    Attributes:
        model: whole, on the CPU, and the caller's alone.
        trained_names: of the parameters that the run changes, in one of its stages at least.
        base: whose files hold the others; None where all train.
    """

    model: ColmModel
    trained_names: frozenset[str]
    base: ModelFolder | None = None

    @property
    def base_digests(self) -> tuple[str, ...]:
        """Of the base's chain files."""
        return self.base.manifest.chains if self.base else ()

    @classmethod
    def of(cls, config: TrainConfig) -> StartingPoint:
        """Raises as `Tuning.open_base`."""
        tuning = config.tuning
        if tuning is None:
            model = initial_model(config.model, config.seed)
            return cls(model, frozenset(name for name, _ in model.named_parameters()))
        base = ModelFolder.open(tuning.base)
        model = tuning.open_base(base, config.model, config.seed)
        return cls(model, tuning.trained_names(model), base)
