"""Several processes, started by torchrun, over which FSDP2 spreads weights, gradients and
optimizer state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from colm_serve.model.transformer import ColmModel
from colm_serve.training.data_parallel import DataParallel


class FullySharded(DataParallel):
    """One of the processes; `DataParallel` says what its methods are for."""

    @classmethod
    @contextmanager
    def joined(cls, device: str) -> Iterator[Self]:
        """Join the process group for the block, unless the caller has."""
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        is_ours = not dist.is_initialized()
        if is_ours:
            dist.init_process_group("gloo" if device == "cpu" else "nccl")
        try:
            yield cls(torch.device(device), dist.get_rank(), dist.get_world_size())
        finally:
            if is_ours:
                dist.destroy_process_group()

    def shard(self, model: ColmModel) -> None:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "level_logits")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gloo adds up, but does not average.
                module.set_force_sum_reduction_for_comms(True)

    def reshard(self, model: ColmModel) -> None:
        # A forward pass without a backward one leaves whole weights in place of the shards.
        assert isinstance(model, FSDPModule)
        model.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def share(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        tensor = tensor.to(parameter.device)
        if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
            return tensor
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    def mean(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / self.num_processes

    def any(self, flag: bool) -> bool:
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def merge(self, entries: Mapping[str, Any]) -> dict[str, Any]:
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

    def wait_for_all(self) -> None:
        dist.barrier()
