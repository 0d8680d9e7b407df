"""The tokenized corpus of a run: what it trains on, and what it is measured on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from colm_serve.errors import InvalidConfig
from colm_serve.files import write_atomically, writing
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.batches import Batches, StoredBatches, StreamedBatches, TokenArray
from colm_serve.training.config import TrainConfig
from colm_serve.training.corpus import Corpus, read_corpus
from colm_serve.training.document_encoder import DocumentEncoder
from colm_serve.training.heldout import check_heldout, read_streamed_heldout
from colm_serve.training.streamed_corpus import StreamedCorpus
from colm_serve.training.tokenizer import save_tokenizer, train_tokenizer

_log = logging.getLogger(__name__)

#: Of a streamed corpus a tokenizer learns from this much text at its beginning.
_TOKENIZER_CHARACTERS = 2**26
_MARKER = "dataset.json"


@dataclass(frozen=True)
class Dataset:
    """A run's tokenizer and tokens.

    Attributes:
        open_batches: the sequences to train on, given what `Batches.state` said when the run was
            interrupted.
    """

    tokenizer: Tokenizer
    heldout: TokenArray
    open_batches: Callable[[Mapping[str, Any]], Batches]


def prepare_dataset(config: TrainConfig, run_folder: Path, data: Path | None) -> Dataset:
    """Make the run's tokenizer and tokens in `run_folder`, or open what an earlier start left
    there. Of a streamed corpus only the tokenizer is written.

    Raises:
        InvalidConfig: the folder was started with another corpus; or as `StreamedCorpus`.
        InvalidArgument: the corpus is too small for the recipe.
        Unavailable: as `StreamedCorpus`.
    """
    if config.stream is None:
        return _prepare_stored(config, run_folder, data)
    if data is not None:
        raise InvalidConfig("stream", config.stream.dataset, "null where --data names a folder")
    corpus = StreamedCorpus(config.stream, config.text_field, config.heldout_fraction)
    return _prepare_streamed(config, run_folder, corpus)


def _prepare_stored(config: TrainConfig, run_folder: Path, data: Path | None) -> Dataset:
    corpus = read_corpus(data, config.heldout_fraction, config.exclude, config.text_field)
    if not _is_prepared(run_folder, corpus.name, corpus.fingerprint):
        _tokenize(config, run_folder, corpus)
    train, heldout = (
        np.load(run_folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
        for split in ("train", "heldout")
    )
    check_heldout(corpus.name, len(heldout), config)
    tokenizer = load_model_tokenizer(run_folder, config.model.vocab_size)
    return Dataset(tokenizer, heldout, lambda states: StoredBatches(train, config))


def _prepare_streamed(config: TrainConfig, run_folder: Path, corpus: StreamedCorpus) -> Dataset:
    if not (run_folder / _MARKER).exists():
        tokenizer = _make_tokenizer(config, _beginning(corpus.training()))
        save_tokenizer(tokenizer, run_folder, config.model.max_context)
    tokenizer = load_model_tokenizer(run_folder, config.model.vocab_size)
    encoder = DocumentEncoder(tokenizer, config.model, corpus.name)
    heldout = read_streamed_heldout(corpus, encoder, config)
    if not _is_prepared(run_folder, corpus.name, heldout.fingerprint):
        _mark_prepared(
            run_folder,
            corpus.name,
            heldout.fingerprint,
            heldout={"num_documents": heldout.num_documents, "num_tokens": len(heldout.tokens)},
        )
    return Dataset(
        tokenizer, heldout.tokens, lambda states: StreamedBatches(corpus, encoder, config, states)
    )


def _is_prepared(run_folder: Path, name: str, fingerprint: str) -> bool:
    """Whether an earlier start has; raises InvalidConfig if it had another corpus."""
    marker = run_folder / _MARKER
    if not marker.exists():
        return False
    if json.loads(marker.read_text("utf-8"))["fingerprint"] != fingerprint:
        raise InvalidConfig("data", name, f"the corpus that {run_folder} was started with")
    return True


def _mark_prepared(run_folder: Path, name: str, fingerprint: str, **splits: object) -> None:
    """The last step of preparing, so that a folder with this file has all the others."""
    summary = {"corpus": name, "fingerprint": fingerprint, **splits}
    write_atomically(run_folder / _MARKER, json.dumps(summary, indent=2) + "\n")
    _log.info("tokenized: %s", summary)


def _tokenize(config: TrainConfig, run_folder: Path, corpus: Corpus) -> None:
    tokenizer = _make_tokenizer(config, (document.text for document in corpus.train))
    save_tokenizer(tokenizer, run_folder, config.model.max_context)
    encoder = DocumentEncoder(tokenizer, config.model, corpus.name)
    summary: dict[str, object] = {}
    width = np.uint16 if config.model.vocab_size <= 2**16 else np.uint32
    for split, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
        tokens = encoder.encode(documents).astype(width)
        path = run_folder / f"{split}.npy"
        with writing(path):
            np.save(path, tokens, allow_pickle=False)
        summary[split] = {
            "num_documents": len(documents),
            "num_bytes": sum(len(d.text.encode()) for d in documents),
            "num_tokens": len(tokens),
        }
    _mark_prepared(run_folder, corpus.name, corpus.fingerprint, **summary)


def _make_tokenizer(config: TrainConfig, texts: Iterable[str]) -> Tokenizer:
    vocab_size = config.model.vocab_size
    if config.tuning is not None:
        return load_model_tokenizer(config.tuning.base, vocab_size)
    _log.info("training the tokenizer")
    tokenizer = train_tokenizer(texts, vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        found = f"the {tokenizer.get_vocab_size()} tokens that the corpus yields"
        raise InvalidConfig("model.vocab_size", vocab_size, found)
    return tokenizer


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    num_characters = 0
    for text in texts:
        yield text
        num_characters += len(text)
        if num_characters >= _TOKENIZER_CHARACTERS:
            return
