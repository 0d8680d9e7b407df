"""Documents as the token ids that a model trains on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from colm_serve.model.config import ColmConfig
from colm_serve.training.corpus import Document
from colm_serve.training.tokenizer import SPECIAL_TOKENS


class DocumentEncoder:
    """Documents as one stream of token ids: for each a header, the text, end of text.

    With a tokenizer of ours the header `<|system|>corpus<|user|>path<|assistant|>` gives the role
    tokens a meaning. With another one, an imported model's, it is the config's bos token, and the
    end is its first eos token, where it has them.
    """

    def __init__(self, tokenizer: Tokenizer, config: ColmConfig, corpus_name: str) -> None:
        self._encode = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._roles: tuple[list[int], list[int]] | None = None
        if vocabulary.keys() >= set(SPECIAL_TOKENS):
            end, system, user, assistant = (vocabulary[token] for token in SPECIAL_TOKENS)
            self._roles = [system, *self._encode([corpus_name])[0].ids, user], [assistant]
            self._end = [end]
        else:
            self._bos = [] if config.bos_token_id is None else [config.bos_token_id]
            self._end = list(config.eos_token_ids[:1])

    def encode(self, documents: Iterable[Document]) -> npt.NDArray[np.uint32]:
        """Token ids of one or more documents."""
        documents = list(documents)
        texts = self._encode([document.text for document in documents])
        ids: list[npt.NDArray[np.uint32]] = []
        for header, text in zip(self._headers(documents), texts, strict=True):
            ids += [np.array(part, np.uint32) for part in (header, text.ids, self._end)]
        return np.concatenate(ids)

    def _headers(self, documents: Sequence[Document]) -> list[list[int]]:
        if self._roles is None:
            return [self._bos] * len(documents)
        before, after = self._roles
        paths = self._encode([document.path for document in documents])
        return [[*before, *path.ids, *after] for path in paths]
