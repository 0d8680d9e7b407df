"""A Hugging Face dataset as documents, read when they are asked for and kept nowhere.

Whether a document is held out is a function of its text, so shares of the dataset that are read
apart agree on it, and a text that occurs again is never in both splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from colm_serve.errors import ColmError, InvalidArgument, InvalidConfig, Unavailable
from colm_serve.training.corpus import is_heldout
from colm_serve.training.rows import row_text
from colm_serve.training.stream_config import StreamConfig


class StreamedCorpus:
    """A dataset, open; its rows are read in their order.

    Raises:
        InvalidConfig: there is no such dataset, configuration, split or file, or the extra is not
            installed. Its methods do too, where a file cannot be read.
        InvalidArgument: its methods do, where a row has no text in `text_field`.
        Unavailable: the hub cannot be reached; its methods do too.
    """

    def __init__(self, stream: StreamConfig, text_field: str, heldout_fraction: float) -> None:
        self.name = stream.name
        self._stream = stream
        self._text_field = text_field
        self._heldout_fraction = heldout_fraction
        self._dataset = _open(stream)

    @property
    def num_shards(self) -> int:
        """Into how many shares the dataset's files can be split."""
        return int(self._dataset.num_shards)

    def heldout(self) -> Iterator[str]:
        """The held-out texts, once."""
        return self._texts(self._dataset, heldout=True)

    def training(self) -> Iterator[str]:
        """The other texts, once."""
        return self._texts(self._dataset, heldout=False)

    def share(self, num_shares: int, index: int) -> DocumentStream:
        """The training texts in share `index`, counted from 0, of the dataset's files."""
        share = self._dataset.shard(num_shares, index)
        return DocumentStream(share, partial(self._texts, heldout=False))

    def _texts(self, dataset: Any, heldout: bool) -> Iterator[str]:
        with _told_in_a_line(self._stream):
            for row in dataset:
                text = row_text(row, self._text_field, self.name)
                if text.strip() and is_heldout(text, self._heldout_fraction) is heldout:
                    yield text


class DocumentStream:
    """Training texts of one share of a dataset, pass after pass without an end."""

    def __init__(self, share: Any, texts_of: Callable[[Any], Iterator[str]]) -> None:
        self._share = share
        self._texts_of = texts_of
        self._texts = texts_of(share)

    def take(self, count: int) -> list[str]:
        """The next `count` texts."""
        texts: list[str] = []
        num_passes_without = 0
        while True:
            found = list(islice(self._texts, count - len(texts)))
            texts += found
            if len(texts) == count:
                return texts
            # The first may have ended before this call.
            num_passes_without = 0 if found else num_passes_without + 1
            if num_passes_without > 1:
                raise InvalidArgument("data", "nothing", "a dataset with texts to train on")
            self._begin_pass(self._share.epoch + 1)

    def state(self) -> dict[str, Any]:
        """Where the stream is, for `go_on_from`; something must have been taken."""
        state: dict[str, Any] = self._share.state_dict()
        return state

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Continue as a stream would whose `state` this is."""
        self._share.load_state_dict(state)
        self._begin_pass(state["epoch"])

    def _begin_pass(self, epoch: int) -> None:
        self._share.set_epoch(epoch)
        self._texts = self._texts_of(self._share)


def _open(stream: StreamConfig) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidConfig(
            "stream", stream.dataset, "null, or a dataset once datasets is installed (extra: train)"
        ) from error
    with _told_in_a_line(stream):
        splits = load_dataset(
            stream.dataset,
            stream.config,
            revision=stream.revision,
            data_files=list(stream.data_files) or None,
            streaming=True,
        )
    if stream.split not in splits:
        raise InvalidConfig("stream.split", stream.split, f"one of {sorted(splits)}")
    return splits[stream.split]


@contextmanager
def _told_in_a_line(stream: StreamConfig) -> Iterator[None]:
    """What the library raises, as an error of ours."""
    try:
        yield
    except ColmError:
        raise
    except ConnectionError as error:
        raise Unavailable(f"stream.dataset: {stream.dataset}: {_line(error)}") from error
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        allowed = f"a dataset that can be read ({_line(error) or 'no such files'})"
        raise InvalidConfig("stream", stream.shown, allowed) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
