"""The processes that train one model together, and what they do in common.

Every process computes its share of a step's micro-batches. Without torchrun there is one process,
and nothing communicates; `FullySharded` is what several do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colm_serve.errors import InvalidConfig
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig


@dataclass(frozen=True)
class DataParallel:
    """This process's place among those that train together; here it is alone.

    Attributes:
        device: what this process computes on.
        rank: the process of rank 0 leads: it writes the files.
        num_processes: how many there are.
    """

    device: torch.device
    rank: int = 0
    num_processes: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def check_shares(self, config: TrainConfig) -> None:
        """Raise InvalidConfig unless a step's work can be shared evenly."""
        if config.num_micro_batches % self.num_processes:
            raise InvalidConfig(
                "sequences_per_step",
                config.sequences_per_step,
                f"a multiple of sequences_per_micro_batch, {config.sequences_per_micro_batch}, "
                f"times the {self.num_processes} processes",
            )
        draws_levels = config.lower_levels not in (None, 0, config.model.num_chains - 1)
        if self.num_processes > 1 and config.model.head == "per_level" and draws_levels:
            # Processes that draw different levels would reduce the gradients of different heads.
            raise InvalidConfig(
                "lower_levels",
                config.lower_levels,
                "null where several processes train head: per_level",
            )

    def shard(self, model: ColmModel) -> None:
        """Spread the weights over the processes."""

    def reshard(self, model: ColmModel) -> None:
        """Give back whole weights that a forward pass has left in place of the shards."""

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor, of which this process may hold a shard; all processes call it."""
        return tensor

    def share(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's part of a whole tensor that belongs to a parameter."""
        return tensor.to(parameter.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of every process's value."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all take the same turn at the same step."""
        return flag

    def merge(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Every process's entries, plain values, together."""
        return dict(entries)

    def wait_for_all(self) -> None:
        """Return once every process is here."""

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors by name, on the leader's CPU; the others, which call it too, get none."""
        collected = {}
        for name, tensor in tensors:
            whole = self.whole(tensor.detach())
            if self.leads:
                collected[name] = whole.cpu().contiguous()
        return collected

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Lets the other processes into the block once the leader is through."""
        if not self.leads:
            self.wait_for_all()
        try:
            yield
        finally:
            if self.leads:
                self.wait_for_all()


@contextmanager
def join_processes(device: str | None) -> Iterator[DataParallel]:
    """Become one of the processes that torchrun has started, if it has started this one.

    Args:
        device: default: this process's GPU where there is one, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_torchelastic_launched():
        yield DataParallel(torch.device(device))
        return
    # Nearly a second's import, which every command would wait for.
    from colm_serve.training.fully_sharded import FullySharded

    with FullySharded.joined(device) as group:
        yield group
