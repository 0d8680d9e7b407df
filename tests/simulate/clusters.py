"""What tests of the simulator share: costs, small clusters, and a worker to be asked alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colm_serve.config import ClusterConfig, DecodeConfig
from colm_serve.core import Member, WorkerKind
from colm_serve.simulate.clock import VirtualClock
from colm_serve.simulate.costs import PassCosts, StepCosts, WorkerCosts
from colm_serve.simulate.decode import VirtualDecodeWorker
from colm_serve.simulate.sequence import VirtualSequence
from colm_serve.simulate.trace import Block

COSTS = WorkerCosts(
    step=StepCosts(
        chain_s=(0.004, 0.002, 0.002),
        row_s=(0.0004, 0.0002, 0.0002),
        wide_row_s=(0.0001, 0.0001, 0.0001),
        cached_token_s=(1e-6, 1e-6, 1e-6),
    ),
    prefill=PassCosts(pass_s=0.001, token_s=0.0001, attended_key_s=1e-8),
    transfer_token_s=1e-5,
    hop_s=0.0005,
)


def cluster_config(**rooms: Any) -> ClusterConfig:
    """One prefill and two decode workers, and classes with and without targets."""
    defaults: dict[str, Any] = {
        "model": Path("nowhere"),
        "prefill": {"count": 1},
        "decode": {"count": 2, "kv_tokens": 8192, "max_rows": 8},
        "sla_classes": {
            "default": {},
            "interactive": {"ttft_ms": 200, "tpot_ms": 12, "deadline_s": 20},
        },
    }
    return ClusterConfig.model_validate({**defaults, **rooms})


def lone_worker(config: DecodeConfig, clock: VirtualClock) -> VirtualDecodeWorker:
    """A decode worker that computes every prompt itself."""
    member = Member(WorkerKind.DECODE, "d", "d", 1, "simulated")
    return VirtualDecodeWorker(member, config, COSTS, clock, {})


def make_sequence(number: int, num_prompt: int, max_tokens: int, level: int) -> VirtualSequence:
    """One whose prompt and output nobody else has."""
    blocks = (Block(2 * number, num_prompt), Block(2 * number + 1, max_tokens))
    return VirtualSequence(
        str(number), blocks, num_prompt, max_tokens, level, (), None, lambda sequence: None
    )
