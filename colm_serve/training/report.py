"""A trained model's held-out loss by level: a table to read, `eval.json` for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from colm_serve.errors import CheckpointError
from colm_serve.files import write_atomically
from colm_serve.model.checkpoint import load_model
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.config import TrainConfig
from colm_serve.training.heldout import read_heldout
from colm_serve.training.loss import evaluate
from colm_serve.training.tokenizer import token_bytes

_FILE_NAME = "eval.json"


@dataclass(frozen=True)
class LevelReport:
    """One row of the table."""

    level: int
    active_params: int
    heldout_loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Report:
    """What a model's levels lose on text it was not trained on; loss in nats per token."""

    corpus: str
    num_documents: int
    num_tokens: int
    seq_len: int
    levels: tuple[LevelReport, ...]

    def save(self, model_folder: Path) -> None:
        """Write `eval.json`."""
        write_atomically(model_folder / _FILE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, model_folder: Path) -> Report:
        """Read `eval.json`; raises CheckpointError when it is not there or is not one."""
        path = model_folder / _FILE_NAME
        try:
            raw = json.loads(path.read_text("utf-8"))
            levels = tuple(LevelReport(**level) for level in raw.pop("levels"))
            return cls(**raw, levels=levels)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a held-out evaluation: {error}") from error

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"{self.num_tokens:,} held-out tokens of {self.corpus}")
        for heading in ("level", "active params", "held-out loss (nats/token)", "bits/byte"):
            table.add_column(heading, justify="right")
        for level in self.levels:
            table.add_row(
                str(level.level),
                f"{level.active_params:,}",
                f"{level.heldout_loss:.3f}",
                f"{level.bits_per_byte:.3f}",
            )
        return table


def evaluate_folder(model_folder: Path, config: TrainConfig, data: Path | None = None) -> Report:
    """Score every level of a model folder in fp32 on its recipe's held-out documents.

    Args:
        model_folder: chain files and tokenizer.
        config: the recipe: which documents are held out, and how long a sequence is.
        data: a folder to take them from instead of the recipe's own corpus.

    Raises:
        CheckpointError: the folder is no CoLM model.
        InvalidArgument, InvalidConfig, Unavailable: as `read_heldout`.
    """
    model = load_model(model_folder).model
    tokenizer = load_model_tokenizer(model_folder, model.config.vocab_size)
    heldout = read_heldout(config, tokenizer, data)
    losses = evaluate(model, heldout.tokens, token_bytes(tokenizer), seq_len=config.seq_len)
    return Report(
        corpus=heldout.corpus,
        num_documents=heldout.num_documents,
        num_tokens=len(heldout.tokens),
        seq_len=config.seq_len,
        levels=tuple(
            LevelReport(
                loss.level,
                model.config.num_params(loss.level),
                round(loss.nats_per_token, 4),
                round(loss.bits_per_byte, 4),
            )
            for loss in losses
        ),
    )
