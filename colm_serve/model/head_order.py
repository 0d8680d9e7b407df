"""The order of a chain's query heads: always tile order in memory, the config's in files."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from colm_serve.model.config import ColmConfig


def stored_order(name: str, config: ColmConfig, chain: int, tensor: Tensor) -> Tensor:
    """Put query heads, which stand in tile order in memory, into the config's order."""
    return _reorder_heads(name, config, chain, tensor, _tile_to_interleave)


def runtime_order(name: str, config: ColmConfig, chain: int, tensor: Tensor) -> Tensor:
    """The other way round."""
    return _reorder_heads(name, config, chain, tensor, _interleave_to_tile)


def _reorder_heads(
    name: str,
    config: ColmConfig,
    chain: int,
    tensor: Tensor,
    order: Callable[[int, int], list[int]],
) -> Tensor:
    if config.kv_repeat == "tile" or not name.endswith((".wq.weight", ".wo.weight")):
        return tensor

    def permutation(i: int) -> list[int]:
        kv = config.num_kv_heads if config.kv_sharing == "air" else config.kv_heads_per_chain[i]
        return order(config.heads_per_chain[i], kv)

    if name.endswith(".wq.weight"):
        heads: Tensor = tensor.unflatten(0, (-1, config.head_dim))
        return heads[permutation(chain - 1)].flatten(0, 1)
    columns: list[int] = []
    for i in range(chain):
        start = len(columns)
        columns += [start + head for head in permutation(i)]
    heads = tensor.unflatten(1, (-1, config.head_dim))
    return heads[:, columns].flatten(1, 2)


def stored_heads(config: ColmConfig) -> list[int]:
    """The number that each of chain 1's query heads in memory has in the model's own order."""
    num_heads = config.heads_per_chain[0]
    if config.kv_repeat == "tile":
        return list(range(num_heads))
    return _interleave_to_tile(num_heads, config.kv_heads_per_chain[0])


def _interleave_to_tile(num_heads: int, num_kv_heads: int) -> list[int]:
    """Stored head to read for each tile-ordered head: tile (r, kv) is interleaved (kv, r)."""
    repeats = num_heads // num_kv_heads
    return [(j % num_kv_heads) * repeats + j // num_kv_heads for j in range(num_heads)]


def _tile_to_interleave(num_heads: int, num_kv_heads: int) -> list[int]:
    repeats = num_heads // num_kv_heads
    return [(j % repeats) * num_kv_heads + j // repeats for j in range(num_heads)]
