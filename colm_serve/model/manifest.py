"""A model folder's manifest, `manifest.json`: which config and which chain files are one model.

    {"format": "colm-model-1",
     "digests": {"config.json": "...", "chain-1.safetensors": "...", ...}}

A chain's digest is that of its content, which its file's header carries; the config's is that of
its keys and values. What says nothing of the weights is not in it, so that it may be changed by
hand: tokenizer, chat template, recipe, held-out losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from colm_serve.errors import CheckpointError
from colm_serve.files import write_atomically
from colm_serve.json_file import read_json
from colm_serve.model.chain_file import chain_path
from colm_serve.model.config import CONFIG_FILE

MANIFEST_FILE = "manifest.json"
_FORMAT = "colm-model-1"


@dataclass(frozen=True)
class Manifest:
    """The digests of a model's config and of its chains, the first one's first."""

    config: str
    chains: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, num_chains: int) -> Manifest | None:
        """Read a folder's manifest; None where there is none.

        Args:
            num_chains: how many the folder's config has.

        Raises:
            CheckpointError: it is damaged, or lists other files.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            return None
        raw = read_json(path)
        if raw.get("format", str) != _FORMAT:
            raise raw.unsupported("format", _FORMAT)
        digests = raw.inner("digests")
        names = _names(folder, num_chains)
        if foreign := sorted(digests.values.keys() - set(names)):
            raise CheckpointError(
                f"{path}: digests: it has one of {foreign[0]}, which is no file of a model of "
                f"{num_chains} chains, as {CONFIG_FILE} says"
            )
        config, *chains = (digests.get(name, str) for name in names)
        return cls(config, tuple(chains))

    def write(self, folder: Path) -> None:
        """Raises WriteFailed, as on a full disk."""
        names = _names(folder, len(self.chains))
        digests = dict(zip(names, (self.config, *self.chains), strict=True))
        text = json.dumps({"format": _FORMAT, "digests": digests}, indent=2)
        write_atomically(folder / MANIFEST_FILE, text + "\n")


def config_digest(values: Mapping[str, Any]) -> str:
    """The digest of `config.json`'s content, however it is laid out."""
    text = json.dumps(values, sort_keys=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _names(folder: Path, num_chains: int) -> list[str]:
    chains = (chain_path(folder, chain).name for chain in range(1, num_chains + 1))
    return [CONFIG_FILE, *chains]
