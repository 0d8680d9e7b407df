"""Text to token ids: the tokenizer and the chat template of a model folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from colm_serve.errors import CheckpointError, InvalidArgument
from colm_serve.json_file import read_json
from colm_serve.model.vocabulary import check_vocabulary, load_tokenizer, token_bytes
from colm_serve.router.chat_template import chat_template
from colm_serve.router.control_tokens import ControlTokens
from colm_serve.router.request import ChatMessage
from colm_serve.router.sizes import check_chars


class Tokenizer:
    """Encodes prompts and chats; thread-safe. Loaded with `Tokenizer.load`."""

    def __init__(self, tokenizer: HfTokenizer, settings: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._special = {key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token")}
        self._template = chat_template(settings.get("chat_template"))
        self._controls = ControlTokens(tokenizer, filter(None, self._special.values()))
        find_bytes = functools.partial(token_bytes, tokenizer)
        self._cached_bytes = functools.lru_cache(maxsize=16384)(find_bytes)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """Read tokenizer.json, and tokenizer_config.json if there; None without the former.

        Raises:
            CheckpointError: a file is there but cannot be read.
        """
        tokenizer = load_tokenizer(folder)
        return None if tokenizer is None else cls(tokenizer, _read_settings(folder))

    def check_vocabulary(self, folder: Path, vocab_size: int) -> None:
        """Raise CheckpointError unless a model of this vocabulary knows all of the tokens.

        Args:
            folder: where it is from.
        """
        check_vocabulary(self._tokenizer, folder, vocab_size)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a prompt; other threads go on meanwhile.

        Args:
            add_special_tokens: the model's own, such as BOS.
            parse_special: whether the spelling of a control token in the text is that token.

        Raises:
            InvalidArgument: the text holds half a surrogate pair, so it is no Unicode text.
        """
        _check_unicode("prompt", text)
        if not parse_special:
            return self._controls.encode_text("prompt", text, add_special_tokens=add_special_tokens)
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self, messages: Sequence[ChatMessage], max_chars: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant speaks.

        Control tokens are the template's own: `ControlTokens` says how that is.

        Raises:
            InvalidArgument: the model has no chat template, or it refuses these messages.
            RequestTooLarge: the template makes more than `max_chars` of them.
        """
        contents = [message.content for message in messages]
        broken = self._controls.break_spellings("messages", contents)
        text = self._render(messages, contents if broken is None else broken)
        _check_unicode("messages", text)
        if max_chars is not None:
            check_chars("messages", len(text), max_chars)
        if broken is not None:
            return self._controls.encode_rendered(text)
        return self._encode(text, add_special_tokens=False)

    def spells_control_tokens(self, messages: Sequence[ChatMessage]) -> bool:
        """Whether what users wrote has to be kept from making control tokens; raises as above."""
        contents = [message.content for message in messages]
        return self._controls.break_spellings("messages", contents) is not None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out; U+FFFD stands for bytes that are not UTF-8."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @functools.cached_property
    def longest_token_chars(self) -> int | None:
        """No text has more characters than this for each of its tokens; None where one may."""
        spec = json.loads(self._tokenizer.to_str())
        is_kept = all(_keeps_characters(spec[step]) for step in ("normalizer", "pre_tokenizer"))
        takes_spaces = any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
        if spec["model"]["type"] != "BPE" or not is_kept or takes_spaces:
            return None
        is_bytes = "ByteLevel" in json.dumps(spec["pre_tokenizer"])
        if not (is_bytes or spec["model"].get("byte_fallback")):
            return None
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # A batch, as other threads cannot run while a single text is encoded.
        encode = self._tokenizer.encode_batch_fast
        return tuple(encode([text], add_special_tokens=add_special_tokens)[0].ids)

    def _render(self, messages: Sequence[ChatMessage], contents: Sequence[str]) -> str:
        if self._template is None:
            raise InvalidArgument(
                "messages", "a chat", "a prompt only: this model has no chat template"
            )
        try:
            return self._template.render(
                messages=[
                    {"role": message.role, "content": content}
                    for message, content in zip(messages, contents, strict=True)
                ],
                add_generation_prompt=True,
                **self._special,
            )
        except Exception as error:
            # A template is a program that comes with the model; it may raise anything.
            allowed = f"what the model's chat template takes ({error})"
            raise InvalidArgument("messages", [m.role for m in messages], allowed) from error

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, special ones too; part of a UTF-8 character perhaps."""
        return self._cached_bytes(token_id)


def _keeps_characters(step: dict[str, Any] | None) -> bool:
    """Whether no character of a text is left out by a normalizer or pre-tokenizer."""
    if step is None:
        return True
    if step["type"] == "Sequence":
        inner = step.get("normalizers") or step.get("pretokenizers") or []
        return all(map(_keeps_characters, inner))
    if step["type"] == "Split":
        return bool(step["behavior"] != "Removed")
    return step["type"] in ("ByteLevel", "Prepend", "Metaspace", "Digits")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = read_json(path).values if path.exists() else {}
    template = folder / "chat_template.jinja"
    if not template.exists():
        return settings
    try:
        return {**settings, "chat_template": template.read_text("utf-8")}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{template}: cannot be read: {error}") from error


def _token_text(token: str | dict[str, Any] | None) -> str:
    """A special token is written as its text, or as an object that has the text."""
    if isinstance(token, dict):
        return str(token["content"])
    return token or ""


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(field, text, "Unicode text without lone surrogates") from error
