"""Chain expansion: more chains on top of a trained model (paper 4.2).

The chains that are there keep their files, byte for byte. A new chain starts as training starts
one, but what it adds to the logits is zero: its columns of the shared head, which are its
embedding where that is tied, or of its level's own head. So the expanded model says at every level
what the base's top level said, and learns from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F

from colm_serve.convert.new_model import check_new
from colm_serve.errors import InvalidArgument
from colm_serve.model.chain_file import ChainFile, write_chain
from colm_serve.model.checkpoint import check_shapes, copy_carried_files
from colm_serve.model.config import ColmConfig, KvSharing
from colm_serve.model.folder import ModelFolder, new_model
from colm_serve.model.initial import initial_chain


def expand(
    model: Path,
    out: Path,
    add_chains: Sequence[int],
    *,
    kv_sharing: KvSharing | None = None,
    seed: int = 0,
) -> ColmConfig:
    """Write `model` with more chains to the new folder `out`, all or nothing.

    Args:
        model: any CoLM folder; an imported LLaMA is one of one chain.
        out: must not be there.
        add_chains: each new chain's size, see `expanded_config`.
        kv_sharing: see `expanded_config`.
        seed: of the new weights.

    Returns:
        The new config.

    Raises:
        CheckpointError: a file of `model` is missing, damaged or of another model, or it is
            replaced meanwhile.
        InvalidArgument: `out` exists, or a size that cannot be; the message says which can.
    """
    base = ModelFolder.open(model)
    check_shapes(base)
    config = expanded_config(base.config, add_chains, kv_sharing)
    check_new(out)
    with new_model(out) as staging:
        for chain in base.chains():
            chain.check_content()
            top = chain.copy_to(staging)
        copy_carried_files(base, staging)
        config.save(staging)
        for _ in add_chains:
            top = _write_chain_above(top, config, seed)
    return config


def expanded_config(
    config: ColmConfig, add_chains: Sequence[int], kv_sharing: KvSharing | None = None
) -> ColmConfig:
    """The configuration with chains of these sizes added.

    A size is in query heads, as the paper's {32, 8} is LLaMA's 32 heads and 8 more. Every width
    grows in that proportion: a chain of a quarter of the heads has a quarter of the columns. The
    chains that are there keep their widths; `chains` becomes the list of all their heads.

    Args:
        config: of the model as it is.
        add_chains: query heads of each new chain, lowest level first.
        kv_sharing: "air" keeps the key/value heads of chain 1 for all, "per_chain" gives new
            chains their own. A choice only for a model of one chain; default: what it says.

    Raises:
        InvalidArgument: a value that is not allowed, with what is.
    """
    kv_sharing = kv_sharing or config.kv_sharing
    if config.num_chains > 1 and kv_sharing != config.kv_sharing:
        allowed = f"{config.kv_sharing}, which the model's {config.num_chains} chains were made for"
        raise InvalidArgument("kv_sharing", kv_sharing, allowed)
    if not add_chains:
        raise InvalidArgument("add_chains", list(add_chains), "one or more sizes in query heads")
    reasons = _divisors(config, kv_sharing)
    step = math.lcm(*reasons.values())
    for size in add_chains:
        if size < 1 or size % step:
            raise InvalidArgument("add_chains", size, _allowed_sizes(size, step, reasons))
    heads = (*config.heads_per_chain, *add_chains)

    def widen(width: int) -> int:
        return width * sum(heads) // config.num_heads

    return replace(
        config,
        chains=heads,
        d_model=widen(config.d_model),
        d_ff=widen(config.d_ff),
        num_heads=sum(heads),
        num_kv_heads=config.num_kv_heads if kv_sharing == "air" else widen(config.num_kv_heads),
        kv_sharing=kv_sharing,
    )


def _divisors(config: ColmConfig, kv_sharing: KvSharing) -> dict[str, int]:
    """What a new chain's query heads must be a multiple of, and for the sake of which key."""
    split = {"d_model": config.d_model, "d_ff": config.d_ff}
    if kv_sharing == "per_chain":
        split["num_kv_heads"] = config.num_kv_heads
    divisors = {
        key: config.num_heads // math.gcd(config.num_heads, width) for key, width in split.items()
    }
    if kv_sharing == "air":
        divisors["num_kv_heads"] = config.num_kv_heads
    return divisors


def _allowed_sizes(size: int, step: int, reasons: dict[str, int]) -> str:
    first = max(1, size // step) * step
    sizes = ", ".join(str(first + i * step) for i in range(3))
    because = ", ".join(f"{divisor} for {key}" for key, divisor in reasons.items() if divisor > 1)
    return f"multiples of {step} query heads ({because}), such as {sizes}"


def _write_chain_above(top: ChainFile, config: ColmConfig, seed: int) -> ChainFile:
    chain = top.chain + 1
    tensors = initial_chain(config, chain, seed + chain, top.read_tensor("norm.weight").dtype)
    if config.head == "per_level":
        below = top.read_tensor("head.weight")
        width = config.level_dims[chain - 1]
        tensors["head.weight"] = F.pad(below, (0, width - below.shape[1]))
    else:
        tensors["embedding.weight" if config.tie_embeddings else "head.weight"].zero_()
    return write_chain(top.path.parent, chain, tensors, top.base)
