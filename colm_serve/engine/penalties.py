"""Repetition, presence and frequency penalties of one sequence, counted as it grows.

Rules and order are those of Hugging Face (repetition) and OpenAI (presence, frequency): the first
looks at prompt and output, the others at the output alone.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_serve.core import SamplingParams


class Penalties:
    """Lowers, or with negative values raises, the scores of tokens that the sequence has.

    Args:
        tokens: the sequence's own growing list; each `apply` counts what was added to it.
        num_prompt_tokens: how many of them are the prompt's.
    """

    def __init__(
        self, sampling: SamplingParams, tokens: Sequence[int], num_prompt_tokens: int
    ) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._tokens = tokens
        self._num_prompt = num_prompt_tokens
        self._num_counted = 0
        # Made at the first step, for the size and the device of its scores.
        self._in_text_V: Tensor | None = None
        self._num_in_output_V: Tensor | None = None

    @staticmethod
    def apply_to(sampling: SamplingParams) -> bool:
        """Whether a request has any penalty at all."""
        neutral = (1, 0, 0)
        asked = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        return asked != neutral

    def apply(self, logits_V: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """The scores, penalised, of the token after the sequence's own and `drafts`."""
        in_text_V, num_in_output_V = self._count(logits_V)
        if drafts:
            in_text_V, num_in_output_V = in_text_V.clone(), num_in_output_V.clone()
            _add(torch.tensor(drafts, device=logits_V.device), in_text_V, num_in_output_V)
        if self._repetition != 1:
            penalised_V = torch.where(
                logits_V > 0, logits_V / self._repetition, logits_V * self._repetition
            )
            logits_V = torch.where(in_text_V, penalised_V, logits_V)
        if self._presence or self._frequency:
            logits_V = logits_V - self._frequency * num_in_output_V
            logits_V = logits_V - self._presence * (num_in_output_V > 0)
        return logits_V

    def _count(self, like_V: Tensor) -> tuple[Tensor, Tensor]:
        if self._in_text_V is None or self._num_in_output_V is None:
            self._in_text_V = torch.zeros_like(like_V, dtype=torch.bool)
            self._num_in_output_V = torch.zeros_like(like_V)
        new = torch.tensor(
            self._tokens[self._num_counted :], dtype=torch.long, device=like_V.device
        )
        num_of_prompt = max(0, self._num_prompt - self._num_counted)
        self._in_text_V[new[:num_of_prompt]] = True
        _add(new[num_of_prompt:], self._in_text_V, self._num_in_output_V)
        self._num_counted = len(self._tokens)
        return self._in_text_V, self._num_in_output_V


def _add(output: Tensor, in_text_V: Tensor, num_in_output_V: Tensor) -> None:
    in_text_V[output] = True
    num_in_output_V.index_add_(0, output, torch.ones_like(output, dtype=num_in_output_V.dtype))
