"""What the router knows of the model it serves, without holding any of it."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.model.config import ColmConfig


@dataclass(frozen=True)
class ModelFacts:
    """The sizes and the identity that requests and workers are checked against.

    `variant` is how its decode workers are told from those of other models on the same chain 1.
    """

    name: str
    num_levels: int
    max_context: int
    vocab_size: int
    kv_identity: str
    eos_token_ids: tuple[int, ...] = ()
    variant: str = ""

    @classmethod
    def of(cls, name: str, config: ColmConfig, kv_identity: str, variant: str = "") -> ModelFacts:
        return cls(
            name=name,
            num_levels=config.num_chains,
            max_context=config.max_context,
            vocab_size=config.vocab_size,
            kv_identity=kv_identity,
            eos_token_ids=config.eos_token_ids,
            variant=variant,
        )
