"""What a model's keys and values are called: two workers may exchange them if the names agree."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from colm_serve.errors import CheckpointError
from colm_serve.model.folder import ModelFolder

#: Config keys that decide what chain 1's keys and values are, beside its own sizes.
_KV_KEYS = (
    "vocab_size", "num_layers", "head_dim", "kv_repeat", "ffn", "rope_theta", "rope_scaling",
    "rms_norm_eps",
)  # fmt: skip
#: And those that do where every chain has keys and values of its own.
_CHAIN_KEYS = ("chains", "d_model", "d_ff", "num_heads", "num_kv_heads", "kv_sharing")


def kv_identity(folder: Path) -> str:
    """Digest of chain 1's content and the configuration its keys and values depend on.

    Two workers may exchange KV exactly when these agree. Where chain 1 makes all of it, models
    that share chain 1 agree, whatever they have above it: a base, its expansions, tuned variants.
    """
    return kv_identity_of(ModelFolder.open(folder, 1))


def kv_identity_of(folder: ModelFolder) -> str:
    """The same of a folder that has been opened."""
    config = folder.config
    raw = config.to_dict()
    relevant = {key: raw[key] for key in _KV_KEYS}
    relevant["chain_1"] = (
        config.chain_dims[0],
        config.chain_ff_dims[0],
        config.heads_per_chain[0],
        config.kv_heads_per_chain[0],
    )
    if config.kv_sharing == "per_chain" and config.num_chains > 1:
        relevant |= {key: raw[key] for key in _CHAIN_KEYS}
    text = json.dumps([folder.chain(1).digest, relevant], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def check_variant(folder: Path, base: Path) -> None:
    """Check that a model has the first chain of another, so that they can share keys and values.

    Raises:
        CheckpointError, InvalidConfig: it has not, or cannot be read.
    """
    if kv_identity(folder) != kv_identity(base):
        raise CheckpointError(
            f"{folder}: its keys and values are not those of {base}: a variant shares chain 1's "
            "file and sizes, as `colm expand` and tuning with frozen chains keep them"
        )
