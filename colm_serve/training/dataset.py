"""The tokenized corpus of a run: memory-mapped token ids, and which of them a step reads."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from colm_serve.errors import InvalidArgument, InvalidConfig
from colm_serve.files import write_atomically
from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import Corpus, read_corpus
from colm_serve.training.tokenizer import (
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

_log = logging.getLogger(__name__)

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Dataset:
    """A run folder's tokenizer and token streams."""

    tokenizer: Tokenizer
    train: TokenArray
    heldout: TokenArray


def prepare_dataset(config: TrainConfig, run_folder: Path, data: Path | None) -> Dataset:
    """Tokenize the corpus into `run_folder`, or open what an earlier start left there.

    Raises:
        InvalidConfig: the folder's tokens were made from another corpus.
        InvalidArgument: the corpus is too small for the recipe.
    """
    corpus = read_corpus(data, config.heldout_fraction, config.exclude, config.text_field)
    marker = run_folder / "dataset.json"
    if marker.exists():
        found = json.loads(marker.read_text("utf-8"))["fingerprint"]
        if found != corpus.fingerprint:
            raise InvalidConfig(
                "data", corpus.name, f"the corpus that {run_folder} was started with"
            )
    else:
        _tokenize(config, run_folder, corpus)
    return Dataset(
        load_tokenizer(run_folder),
        np.load(run_folder / "train.npy", mmap_mode="r", allow_pickle=False),
        np.load(run_folder / "heldout.npy", mmap_mode="r", allow_pickle=False),
    )


def _tokenize(config: TrainConfig, run_folder: Path, corpus: Corpus) -> None:
    tokenizer = _make_tokenizer(config, corpus)
    save_tokenizer(tokenizer, run_folder, config.model.max_context)
    summary: dict[str, object] = {"corpus": corpus.name, "fingerprint": corpus.fingerprint}
    width = np.uint16 if config.model.vocab_size <= 2**16 else np.uint32
    for split, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
        tokens = encode_documents(tokenizer, config.model, corpus, documents).astype(width)
        np.save(run_folder / f"{split}.npy", tokens, allow_pickle=False)
        summary[split] = {
            "num_documents": len(documents),
            "num_bytes": sum(len(d.text.encode()) for d in documents),
            "num_tokens": len(tokens),
        }
    # Last, so that a folder with this file has all the others.
    write_atomically(run_folder / "dataset.json", json.dumps(summary, indent=2) + "\n")
    _log.info("tokenized: %s", summary)


def _make_tokenizer(config: TrainConfig, corpus: Corpus) -> Tokenizer:
    vocab_size = config.model.vocab_size
    if config.tuning is not None:
        tokenizer = load_tokenizer(config.tuning.base)
        if tokenizer.get_vocab_size() > vocab_size:
            allowed = f"a model with {vocab_size} tokens or fewer, as its config.json says"
            raise InvalidConfig("tuning.base", str(config.tuning.base), allowed)
        return tokenizer
    _log.info("training the tokenizer on %d documents", len(corpus.train))
    tokenizer = train_tokenizer((d.text for d in corpus.train), vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        found = f"the {tokenizer.get_vocab_size()} tokens that the corpus yields"
        raise InvalidConfig("model.vocab_size", vocab_size, found)
    return tokenizer


class TrainingBatches:
    """The sequences of each step: a function of (seed, step) alone, so a resumed run agrees.

    Every epoch cuts the stream into windows at a shift of its own and shuffles them.
    """

    def __init__(self, tokens: TokenArray, config: TrainConfig) -> None:
        self._tokens = tokens
        self._seq_len = config.seq_len
        self._num_sequences = config.sequences_per_step
        self._seed = config.seed
        self._num_windows = (len(tokens) - 1) // config.seq_len - 1
        if self._num_windows < 1:
            raise InvalidArgument(
                "data",
                f"{len(tokens)} tokens",
                f"a corpus of more than {2 * config.seq_len} tokens, two of seq_len",
            )
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getitem__(self, step: int) -> npt.NDArray[np.int64]:
        """Token ids [sequences_per_step, seq_len + 1] of step `step`, counted from 0."""
        first = step * self._num_sequences
        return np.stack([self._window(i) for i in range(first, first + self._num_sequences)])

    def _window(self, index: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(index, self._num_windows)
        start = self._starts(epoch)[place]
        return self._tokens[start : start + self._seq_len + 1].astype(np.int64)

    def _starts(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            shift = generator.integers(self._seq_len)
            starts = generator.permutation(self._num_windows) * self._seq_len + shift
            self._epoch = (epoch, starts)
        return self._epoch[1]
