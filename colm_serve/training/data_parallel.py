"""Processes that train one model together: FSDP2 over the processes that torchrun starts.

Every process computes its share of a step's micro-batches; weights, gradients and optimizer state
are sharded among all. Without torchrun there is one process, and nothing here communicates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from colm_serve.errors import InvalidConfig
from colm_serve.model.transformer import ColmModel
from colm_serve.training.config import TrainConfig


@dataclass(frozen=True)
class DataParallel:
    """This process's place among those that train together.

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
        """Spread the weights over the processes, one unit a block and one for the rest."""
        if self.num_processes == 1:
            return
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "level_logits")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gloo adds up, but does not average.
                module.set_force_sum_reduction_for_comms(True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of every process's value."""
        if self.num_processes > 1:
            dist.all_reduce(value)
        return value / self.num_processes

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all take the same turn at the same step."""
        if self.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors by name, on the leader's CPU; the others, which call it too, get none."""
        collected = {}
        for name, tensor in tensors:
            whole = gather(tensor.detach())
            if self.leads:
                collected[name] = whole.cpu().contiguous()
        return collected

    def merge(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Every process's entries, plain values, together."""
        if self.num_processes == 1:
            return dict(entries)
        text = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.num_processes, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(text)
        dist.all_reduce(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        padded[: len(text)] = text
        parts = [torch.empty_like(padded) for _ in range(self.num_processes)]
        dist.all_gather(parts, padded)
        merged: dict[str, Any] = {}
        for part, size in zip(parts, sizes.tolist(), strict=True):
            merged |= json.loads(bytes(part[:size].tolist()))
        return merged

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

    def wait_for_all(self) -> None:
        """Return once every process is here."""
        if self.num_processes > 1:
            dist.barrier()


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
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield DataParallel(torch.device(device), dist.get_rank(), dist.get_world_size())
    finally:
        if is_ours:
            dist.destroy_process_group()


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which this process may hold a shard; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a whole tensor that belongs to a parameter."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
