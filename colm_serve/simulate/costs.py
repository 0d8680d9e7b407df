"""What the work of a simulated worker takes, as real ones have measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from colm_serve.core import PrefillCost, StepCost, TransferCost
from colm_serve.errors import InvalidConfig
from colm_serve.files import write_atomically

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PerChain = tuple[Seconds, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepCosts(_Frozen):
    """Coefficients of `core.StepCost`, one of each kind for every chain."""

    chain_s: PerChain = Field(min_length=1)
    row_s: PerChain
    wide_row_s: PerChain = ()
    cached_token_s: PerChain = ()

    @model_validator(mode="after")
    def _chains_agree(self) -> StepCosts:
        for name in ("row_s", "wide_row_s", "cached_token_s"):
            values = getattr(self, name)
            if len(values) not in {len(self.chain_s)} | ({0} if name != "row_s" else set()):
                raise ValueError(
                    f"{name} has {len(values)} values where chain_s has {len(self.chain_s)}"
                )
        return self

    @classmethod
    def of(cls, cost: StepCost) -> StepCosts:
        """What a worker tells, or has measured."""
        return cls(
            chain_s=cost.chain_s,
            row_s=cost.row_s,
            wide_row_s=cost.wide_row_s,
            cached_token_s=cost.cached_token_s,
        )

    @property
    def step_cost(self) -> StepCost:
        return StepCost(self.chain_s, self.row_s, self.wide_row_s, self.cached_token_s)


class PassCosts(_Frozen):
    """A forward pass over prompts: fixed, for each token, for each key that a token attends to."""

    pass_s: Seconds = 0.0
    token_s: float = Field(gt=0)
    attended_key_s: Seconds = 0.0

    @classmethod
    def of(cls, cost: PrefillCost) -> PassCosts:
        """What a worker tells, or has measured."""
        return cls(pass_s=cost.pass_s, token_s=cost.token_s, attended_key_s=cost.attended_key_s)

    def seconds(self, num_tokens: int, num_attended_keys: int) -> float:
        return self.pass_s + self.token_s * num_tokens + self.attended_key_s * num_attended_keys

    def cost(self, chunk_tokens: int) -> PrefillCost:
        """As a worker that computes so many tokens in a pass tells it."""
        return PrefillCost(self.pass_s, self.token_s, self.attended_key_s, chunk_tokens)


class WorkerCosts(_Frozen):
    """The coefficients of one kind of cluster.

    A message takes `hop_s` from process to process; K and V of a token take `transfer_token_s`
    on their way to a decode worker, most of it while others are being computed.
    """

    step: StepCosts
    prefill: PassCosts
    transfer_token_s: Seconds = 0.0
    hop_s: Seconds = 0.0

    @property
    def num_levels(self) -> int:
        return len(self.step.chain_s)

    @property
    def transfer_cost(self) -> TransferCost:
        return TransferCost(2 * self.hop_s, self.transfer_token_s)

    @property
    def link_tokens_per_s(self) -> float | None:
        """None if the link costs nothing."""
        return 1 / self.transfer_token_s if self.transfer_token_s else None

    @classmethod
    def load(cls, path: Path) -> WorkerCosts:
        """Read a JSON file of measured costs.

        Raises:
            InvalidConfig: not there, not JSON, an unknown key or a value that is not allowed.
        """
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig("costs", str(path), f"a readable file ({error})") from error
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(("costs", *map(str, problem["loc"])))
            raise InvalidConfig(key, problem.get("input"), problem["msg"]) from error

    def save(self, path: Path) -> None:
        """Raises WriteFailed, as on a full disk."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
