"""Going on from a trained model with its first chains frozen: chain tuning (paper 4.5), and the
training that follows an expansion (4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from colm_serve.errors import InvalidConfig
from colm_serve.model.checkpoint import chain_tensors, load_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.folder import ModelFolder
from colm_serve.model.layers import ChainLinear
from colm_serve.model.transformer import ColmModel
from colm_serve.training.lora import add_adapters, is_adapter


@dataclass(frozen=True)
class Tuning:
    """Where a run begins, if not at random weights, and what of it stays.

    Attributes:
        base: the model folder to go on from; its tokenizer is the run's.
        frozen_chains: its first chains that stay as they are, and whose levels do not count in
            the loss. From one on, chain 1's file is the base's, byte for byte, so both models
            share a prefill pool and a prefix cache.
        lora_rank: of the matrices that `peft` adds to those of the other chains' blocks, which
            then train instead; the product is merged in the end. The head of a chain that an
            expansion has just added is zero, and lets no gradient through: it trains as a whole
            with them. None: every weight of the other chains trains.

    Raises:
        InvalidConfig: a value that is not allowed, named with what is.
    """

    base: Path
    frozen_chains: int = 1
    lora_rank: int | None = None

    @classmethod
    def from_dict(cls, raw: Any) -> Tuning:
        """Build from a recipe's `tuning`."""
        known = [field.name for field in fields(cls)]
        if not isinstance(raw, dict) or not set(raw) <= set(known) or "base" not in raw:
            raise InvalidConfig("tuning", raw, f"a mapping with base, of the keys {known}")
        if not isinstance(raw["base"], str):
            raise InvalidConfig("tuning.base", raw["base"], "the path of a model folder")
        return cls(**{**raw, "base": Path(raw["base"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "base": str(self.base)}

    def check(self, config: ColmConfig) -> None:
        """Raise InvalidConfig unless a model of this config can be tuned so."""
        last, rank = config.num_chains - 1, self.lora_rank
        if type(self.frozen_chains) is not int or not 0 <= self.frozen_chains <= last:
            raise InvalidConfig("tuning.frozen_chains", self.frozen_chains, f"0 to {last}")
        if rank is not None and (type(rank) is not int or rank < 1):
            raise InvalidConfig("tuning.lora_rank", rank, "a positive integer, or null")

    def open_base(self, base: ModelFolder, config: ColmConfig, seed: int) -> ColmModel:
        """The model before its first step: the base's weights, and adapters if asked for.

        Raises:
            CheckpointError: the base cannot be read.
            InvalidConfig: it is another model than the recipe's.
        """
        if base.config != config:
            raise InvalidConfig("model", config.to_dict(), f"what {base.path}/config.json has")
        model = load_model(base).model
        self.add_adapters(model, seed)
        return model.train()

    def add_adapters(self, model: ColmModel, seed: int) -> None:
        """Put the run's adapters into a model, if it has any."""
        if self.lora_rank is not None:
            add_adapters(model, self.lora_rank, self.frozen_chains + 1, seed)

    def trained_names(self, model: ColmModel) -> frozenset[str]:
        """Names of the parameters that the run changes, of a model as `open_base` gives it."""
        if self.lora_rank is None:
            frozen = {id(weight) for weight in self._frozen_weights(model)}
            return frozenset(n for n, p in model.named_parameters() if id(p) not in frozen)
        heads = {id(weight) for weight in self._new_heads(model)}
        return frozenset(
            name for name, p in model.named_parameters() if is_adapter(name) or id(p) in heads
        )

    def freeze(self, model: ColmModel, trained_names: frozenset[str]) -> None:
        """Take out of training what stays as it is, whatever the stage trains."""
        for name, parameter in model.named_parameters():
            if name not in trained_names:
                parameter.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, ChainLinear):
                module.num_frozen = self.frozen_chains

    def _frozen_weights(self, model: ColmModel) -> Iterator[nn.Parameter]:
        for chain in range(1, self.frozen_chains + 1):
            yield from (weight for _, weight in chain_tensors(model, chain))

    def _new_heads(self, model: ColmModel) -> Iterator[nn.Parameter]:
        """The heads of later chains that do not look at their chain yet."""
        assert model.head is not None
        widths = model.config.chain_dims
        for chain in range(self.frozen_chains, model.num_chains):
            weight = model.head.weights[chain]
            if not weight[:, -widths[chain] :].any():
                yield weight
