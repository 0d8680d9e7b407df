"""A byte-level BPE tokenizer, trained on the corpus and saved in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from colm_serve.model.config import ColmConfig
from colm_serve.model.vocabulary import text_vocabulary
from colm_serve.training.corpus import Corpus, Document

END_OF_TEXT = "<|endoftext|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (END_OF_TEXT, SYSTEM, USER, ASSISTANT)

#: A conversation is laid out as training documents are: corpus name, file name, file.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens; the special ones come first, `<|endoftext|>` is 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context,
        "chat_template": _CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run or model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_documents(
    tokenizer: Tokenizer, config: ColmConfig, corpus: Corpus, documents: Iterable[Document]
) -> npt.NDArray[np.uint32]:
    """One stream of token ids: for each document a header, the text, end of text.

    With a tokenizer of ours the header `<|system|>corpus<|user|>path<|assistant|>` gives the role
    tokens a meaning. With another one, an imported model's, it is the config's bos token, and the
    end is its first eos token, where it has them.
    """
    documents = list(documents)
    encode = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if vocabulary.keys() >= set(SPECIAL_TOKENS):
        special = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        name = encode([corpus.name])[0].ids
        end = [special[END_OF_TEXT]]
        headers = [
            [special[SYSTEM], *name, special[USER], *path.ids, special[ASSISTANT]]
            for path in encode([d.path for d in documents])
        ]
    else:
        bos = [] if config.bos_token_id is None else [config.bos_token_id]
        end = list(config.eos_token_ids[:1])
        headers = [bos] * len(documents)
    ids: list[npt.NDArray[np.uint32]] = []
    for header, text in zip(headers, encode([d.text for d in documents]), strict=True):
        ids += [np.array(part, np.uint32) for part in (header, text.ids, end)]
    return np.concatenate(ids)


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many bytes of text each token id stands for; special tokens stand for none."""
    texts = text_vocabulary(tokenizer, tokenizer.get_vocab_size())
    return np.array([len(text) for text in texts], np.int64)
