"""Model folders: `config.json`, a `chain-<i>.safetensors` per chain, and a manifest of them all.

A folder is replaced as a whole, and a reader compares each chain that it opens with the manifest
that it read first: so chains of two saves never come together, even if the folder is replaced
while they are being read.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from colm_serve.errors import CheckpointError
from colm_serve.files import new_folder
from colm_serve.json_file import read_json
from colm_serve.model.chain_file import CHAIN_FILE, ChainFile, chain_path, read_header
from colm_serve.model.config import CONFIG_FILE, ColmConfig
from colm_serve.model.manifest import MANIFEST_FILE, Manifest, config_digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder as it was when it was opened.

    Attributes:
        manifest: what belongs together.
        num_chains: how many of the first chains were asked for, and are there.
    """

    path: Path
    config: ColmConfig
    manifest: Manifest
    num_chains: int

    @classmethod
    def open(cls, path: Path, num_chains: int | None = None) -> ModelFolder:
        """Read a folder's config, manifest and first `num_chains` chains' headers (default: all).

        A folder without a manifest, as earlier versions wrote it, is taken with a warning if its
        chains name the same chain 1.

        Raises:
            CheckpointError: a file is missing or damaged, or is not the manifest's.
            InvalidConfig: it has fewer chains than are asked for.
        """
        config, digest, num_chains = _read_config(path, num_chains)
        manifest = Manifest.read(path, config.num_chains)
        if manifest is None:
            return cls._open_unsealed(path, num_chains)
        if digest != manifest.config:
            raise CheckpointError(
                f"{path / CONFIG_FILE}: of another save: its digest is {digest}, and "
                f"{MANIFEST_FILE} has {manifest.config}; if the folder was being written, load it "
                "again, and else copy or write all of it anew (or, if you changed it: "
                f"`colm seal {path}`)"
            )
        _check_no_other_chain(path, config.num_chains)
        return cls(path, config, manifest, num_chains)._checked()

    @classmethod
    def as_found(cls, path: Path, num_chains: int | None = None) -> ModelFolder:
        """The same by what the chains' headers say, whatever a manifest does.

        Raises:
            CheckpointError: a file is missing or damaged, or chains are of different models.
        """
        config, digest, num_chains = _read_config(path, num_chains)
        numbers = range(1, num_chains + 1)
        chains = tuple(read_header(chain_path(path, i), i)["digest"] for i in numbers)
        return cls(path, config, Manifest(digest, chains), num_chains)._checked()

    @classmethod
    def _open_unsealed(cls, path: Path, num_chains: int) -> ModelFolder:
        folder = cls.as_found(path, num_chains)
        if (path / MANIFEST_FILE).exists():
            # What was read before this may be of the folder that was there before.
            raise CheckpointError(f"{path}: replaced while it was being read; load it again")
        _log.warning(
            "%s has no %s, so a mix of chains of two saves cannot be told: `colm seal %s` checks "
            "its files and writes one",
            path, MANIFEST_FILE, path,
        )  # fmt: skip
        return folder

    def _checked(self) -> ModelFolder:
        for chain in self.chains():
            chain.check_header()
        return self

    def chain(self, chain: int) -> ChainFile:
        """The file of a chain, counted from 1."""
        digests = self.manifest.chains
        return ChainFile(chain_path(self.path, chain), chain, digests[chain - 1], digests[0])

    def chains(self) -> list[ChainFile]:
        """The files of the chains that were asked for."""
        return [self.chain(i) for i in range(1, self.num_chains + 1)]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if it was replaced since: other files read may be the new one's."""
        if ModelFolder.open(self.path, self.num_chains) != self:
            raise CheckpointError(f"{self.path}: replaced while it was being read; try again")


def other_files(path: Path) -> list[Path]:
    """What a folder has beside a model's own files."""
    own = {CONFIG_FILE, MANIFEST_FILE}
    return [p for p in sorted(path.iterdir()) if p.name not in own and _chain_of(p) is None]


@contextmanager
def new_model(path: Path) -> Iterator[Path]:
    """A staging folder that becomes the model folder `path` when the block ends without an error.

    The block writes the config and all chains; then comes the manifest. Other files than a
    model's own stay, where there was a folder, unless the block has written ones of their names.

    Raises:
        CheckpointError: the chains are of different models.
        WriteFailed: nothing of it is left, and what was there still is.
    """
    with new_folder(path) as staging:
        yield staging
        if path.is_dir():
            shutil.copymode(path, staging)
            _carry_along(other_files(path), staging)
        ModelFolder.as_found(staging).manifest.write(staging)


def _read_config(path: Path, num_chains: int | None) -> tuple[ColmConfig, str, int]:
    """A folder's config, its digest, and how many chains are asked for."""
    raw = read_json(path / CONFIG_FILE)
    config = ColmConfig.from_json(raw)
    num_chains = config.num_chains if num_chains is None else num_chains
    config.check_level(num_chains, "num_chains")
    return config, config_digest(raw.values), num_chains


def _carry_along(files: Iterable[Path], target: Path) -> None:
    for path in files:
        copy = target / path.name
        if os.path.lexists(copy):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, copy, symlinks=True, copy_function=_link)
        else:
            _link(path, copy)


def _link(source: str | Path, target: str | Path) -> None:
    """One file under two names, of which one goes away with its folder; else a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _check_no_other_chain(path: Path, num_chains: int) -> None:
    for file in path.iterdir():
        chain = _chain_of(file)
        if chain is not None and chain > num_chains:
            raise CheckpointError(
                f"{file}: no file of this model, which has {num_chains} chains by {CONFIG_FILE} "
                f"and {MANIFEST_FILE}; take it away, or copy or write the whole folder anew"
            )


def _chain_of(path: Path) -> int | None:
    match = CHAIN_FILE.fullmatch(path.name)
    return int(match[1]) if match else None
