"""How a request's tokens are chosen, and the limits of that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100
MAX_LOGIT_BIAS_TOKENS = 300
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; draws are keyed by (seed, position).

    `logit_bias` pairs token ids with what is added to their scores; `logprobs` is the number of
    likeliest tokens to report with each chosen one, None for no logprobs at all, and
    `prompt_logprobs` the same for the tokens of the prompt. The end of a `grammar` is the end of
    the text, whatever `ignore_eos` and `min_tokens` say.

    Raises:
        InvalidArgument: a value outside what is allowed.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("top_p", self.top_p, "above 0, at most 1")
        if not 0 < self.repetition_penalty <= 2:
            raise InvalidArgument("repetition_penalty", self.repetition_penalty, "above 0, to 2")
        if self.top_k < 0:
            raise InvalidArgument("top_k", self.top_k, "0 (off) or more")
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", self.max_tokens, "1 or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            allowed = f"0 to max_tokens, {self.max_tokens}"
            raise InvalidArgument("min_tokens", self.min_tokens, allowed)
        for field_name, low, high in (
            ("temperature", 0, 2),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, field_name)
            if not low <= value <= high:
                raise InvalidArgument(field_name, value, f"{low} to {high}")
        for field_name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, field_name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise InvalidArgument(field_name, number, f"0 to {MAX_LOGPROBS}")
        self._check_token_lists()

    def _check_token_lists(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            shown = f"{len(self.stop_token_ids)} ids"
            raise InvalidArgument("stop_token_ids", shown, f"at most {MAX_STOP_TOKEN_IDS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS_TOKENS:
            shown = f"{len(self.logit_bias)} tokens"
            raise InvalidArgument("logit_bias", shown, f"at most {MAX_LOGIT_BIAS_TOKENS}")
        for token_id, bias in self.logit_bias:
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                allowed = f"-{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
                raise InvalidArgument(f"logit_bias[{token_id}]", bias, allowed)

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Raise InvalidArgument unless the model has every token named, and one to choose."""
        ids_below = f"token ids 0 to {vocab_size - 1}"
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgument("stop_token_ids", token_id, ids_below)
        for token_id, _ in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgument("logit_bias", token_id, ids_below)
        if self.min_tokens and len(self.ending_token_ids(eos_token_ids)) >= vocab_size:
            raise InvalidArgument("min_tokens", self.min_tokens, "0: every token ends the text")

    def ending_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end the text, given those of the model."""
        does_eos_end = self.grammar is not None or not self.ignore_eos
        return frozenset(self.stop_token_ids).union(eos_token_ids if does_eos_end else ())
