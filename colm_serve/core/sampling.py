"""How a request's tokens are chosen, and the limits of that."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100
MAX_LOGIT_BIAS_TOKENS = 300
MAX_STOP_TOKEN_IDS = 64
_MAX_INT32 = 2**31 - 1

#: The least and the most of each number; those of a float are floats.
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, _MAX_INT32),
    "temperature": (0.0, 2.0),
    # Far below one over any vocabulary: the likeliest token alone is left, as with less.
    "top_p": (1e-9, 1.0),
    "top_k": (0, _MAX_INT32),
    "seed": (0, MAX_SEED),
    "min_p": (0.0, 1.0),
    # A score over less would leave every other rule without a say, and at last be infinite.
    "repetition_penalty": (0.01, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logit_bias": (-float(MAX_LOGIT_BIAS), float(MAX_LOGIT_BIAS)),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
#: A lower temperature is greedy: tokens whose scores are further apart than a thousandth are never
#: drawn against each other there. Clients send such ones and mean just that.
MIN_TEMPERATURE = 1e-5
#: Fields that the wire carries as float32, but for the biases of `logit_bias`.
FLOAT_FIELDS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def as_carried(field: str, value: float, key: str = "") -> float:
    """What the wire makes of a float that was sent, checked: the nearest float32.

    So a router refuses what a worker would, by the number that its client sent, and both compute
    with the same one.

    Args:
        key: follows the field's name in errors.

    Raises:
        InvalidArgument: it is not within the field's bounds.
    """
    carried = _float32(value)
    low, high = _BOUNDS[field]
    # Written so that NaN fails too.
    if not _float32(low) <= carried <= _float32(high):
        raise InvalidArgument(field + key, value, f"{low:g} to {high:g}")
    return 0.0 if field == "temperature" and carried < _float32(MIN_TEMPERATURE) else carried


def as_written(carried: float) -> float:
    """The shortest number that the wire carries so: most likely the one that was sent."""
    for num_digits in range(6, 9):
        shorter = float(f"{carried:.{num_digits}g}")
        if _float32(shorter) == carried:
            return shorter
    return carried


def _float32(value: float) -> float:
    """The nearest float32; of what is beyond them all, infinity."""
    try:
        (nearest,) = struct.unpack("<f", struct.pack("<f", value + 0.0))
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return float(nearest)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; draws are keyed by (seed, position).

    Floats are rounded to what the wire carries; a temperature below `MIN_TEMPERATURE` is 0,
    greedy. `logit_bias` pairs token ids with what is added to their scores; `logprobs` is the
    number of likeliest tokens to report with each chosen one, None for no logprobs at all, and
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
        for field in FLOAT_FIELDS:
            object.__setattr__(self, field, as_carried(field, getattr(self, field)))
        for field in ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
            value, (low, high) = getattr(self, field), _BOUNDS[field]
            if value is not None and not low <= value <= high:
                raise InvalidArgument(field, value, f"{low} to {high}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            allowed = f"0 to max_tokens, {self.max_tokens}"
            raise InvalidArgument("min_tokens", self.min_tokens, allowed)
        self._check_token_lists()

    def _check_token_lists(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            shown = f"{len(self.stop_token_ids)} ids"
            raise InvalidArgument("stop_token_ids", shown, f"at most {MAX_STOP_TOKEN_IDS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS_TOKENS:
            shown = f"{len(self.logit_bias)} tokens"
            raise InvalidArgument("logit_bias", shown, f"at most {MAX_LOGIT_BIAS_TOKENS}")
        biases = ((i, as_carried("logit_bias", bias, f"[{i}]")) for i, bias in self.logit_bias)
        object.__setattr__(self, "logit_bias", tuple(biases))

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
