"""The committed model is whole, small, and better with every chain."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from colm_serve.model.checkpoint import load_model
from colm_serve.model.folder import ModelFolder
from colm_serve.model.manifest import Manifest
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.config import TrainConfig
from colm_serve.training.loss import evaluate
from colm_serve.training.report import Report
from colm_serve.training.tokenizer import token_bytes

FOLDER = Path(__file__).parents[2] / "models" / "stdlib-air"

#: Written for this test, so in no release of the standard library.
UNSEEN = '''
class InventoryError(Exception):
    """Raised when an item cannot be taken from the inventory."""


class Inventory:
    """Count how many of each item there are."""

    def __init__(self, items=None):
        self._counts = {}
        for name in items or ():
            self.add(name)

    def add(self, name, count=1):
        if not isinstance(count, int):
            raise TypeError("count must be an integer, not %r" % type(count))
        if count < 0:
            raise ValueError("count must not be negative")
        self._counts[name] = self._counts.get(name, 0) + count

    def take(self, name):
        try:
            count = self._counts[name]
        except KeyError:
            raise InventoryError("no such item: %s" % name) from None
        if count == 0:
            return None
        self._counts[name] = count - 1
        return name

    def __len__(self):
        return sum(self._counts.values())

    def __iter__(self):
        for name, count in self._counts.items():
            for i in range(count):
                yield name
'''


def test_every_chain_lowers_the_loss_on_unseen_code() -> None:
    loaded = load_model(FOLDER)
    tokenizer = load_model_tokenizer(FOLDER, loaded.model.config.vocab_size)
    ids = np.array(tokenizer.encode(UNSEEN).ids, np.uint16)
    losses = evaluate(loaded.model, ids, token_bytes(tokenizer), seq_len=len(ids) - 1)
    assert all(above.bits_per_byte < below.bits_per_byte for below, above in pairwise(losses))
    assert losses[-1].bits_per_byte < 1.7


def test_published_figures_belong_to_this_model() -> None:
    report, config = Report.load(FOLDER), TrainConfig.load(FOLDER / "train.yaml")
    assert load_model(FOLDER).model.config == config.model
    assert [row.active_params for row in report.levels] == [
        config.model.num_params(level) for level in (1, 2, 3, 4)
    ]
    for below, above in pairwise(report.levels):
        assert above.heldout_loss < below.heldout_loss - 0.02


def test_its_manifest_is_what_sealing_it_writes() -> None:
    assert ModelFolder.as_found(FOLDER).manifest == Manifest.read(FOLDER, num_chains=4)


def test_folder_stays_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_lower_level_needs_only_its_files(level: int) -> None:
    assert load_model(FOLDER, level).model.num_chains == level
