"""The multi-chain cross-entropy of the paper's 3.4, and held-out loss by level.

The paper pre-trains on the top level's loss alone and tunes the heads of the lower levels
afterwards. Here every level's loss shapes the backbone from the start, so that each level is a
language model in its own right.

Shapes: T rows (tokens), B sequences, S tokens a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from colm_serve.model.transformer import ColmModel


def multi_chain_loss(
    model: ColmModel, token_ids_BS: Tensor, targets_BS: Tensor, level_weights: Sequence[float]
) -> Tensor:
    """Weighted sum of the levels' cross-entropies Loss_i, as a scalar in fp32.

    Args:
        model: with a head; level i is computed once for all levels above it.
        token_ids_BS: [B, S] int64.
        targets_BS: [B, S] int64, the next token at each place.
        level_weights: one a level, lowest first; a level of weight zero costs nothing. Equal
            weights that sum to one give the mean over levels.
    """
    logits = model.level_logits(token_ids_BS)
    targets_T = targets_BS.flatten()
    losses = [
        weight * F.cross_entropy(logits_TV.float(), targets_T)
        for weight, logits_TV in zip(level_weights, logits, strict=True)
        if weight
    ]
    return torch.stack(losses).sum()


def draw_level_weights(
    num_levels: int, lower_levels: int | None, generator: np.random.Generator
) -> tuple[float, ...]:
    """Weights whose expectation is the mean over levels.

    The top level always counts. Of those below, `lower_levels` are drawn (None: all count) and
    stand for the others, which saves their softmax over the vocabulary.
    """
    num_lower = num_levels - 1
    drawn = num_lower if lower_levels is None else min(lower_levels, num_lower)
    weights = np.zeros(num_levels)
    weights[-1] = 1.0
    if drawn:
        weights[generator.choice(num_lower, drawn, replace=False)] = num_lower / drawn
    return tuple(float(weight) for weight in weights / weights.sum())


@dataclass(frozen=True)
class LevelLoss:
    """How well one level predicts text it was not trained on."""

    level: int
    nats_per_token: float
    bits_per_byte: float


def evaluate(
    model: ColmModel,
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32],
    token_bytes: npt.NDArray[np.int64],
    *,
    seq_len: int,
    sequences_per_batch: int = 8,
    max_tokens: int | None = None,
) -> list[LevelLoss]:
    """Mean loss of every level over consecutive windows of `tokens`, in the model's precision.

    Args:
        tokens: one stream of token ids; a tail shorter than a window is left out.
        token_bytes: bytes that each token id stands for.
        max_tokens: look at about this many predictions only, spread over the stream.
    """
    device = model.rotations.device
    nats = np.zeros(model.num_chains)
    num_tokens = num_bytes = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in _windows(tokens, seq_len, sequences_per_batch, max_tokens):
            logits = model.level_logits(torch.from_numpy(inputs).to(device))
            targets_T = torch.from_numpy(targets).flatten().to(device)
            for i, logits_TV in enumerate(logits):
                nats[i] += F.cross_entropy(logits_TV.float(), targets_T, reduction="sum").item()
            num_tokens += targets.size
            num_bytes += int(token_bytes[targets].sum())
    model.train(was_training)
    return [
        LevelLoss(i + 1, float(total / num_tokens), float(total / num_bytes / math.log(2)))
        for i, total in enumerate(nats)
    ]


def _windows(
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32],
    seq_len: int,
    sequences_per_batch: int,
    max_tokens: int | None,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    num_windows = (len(tokens) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {seq_len} + 1")
    wanted = num_windows if max_tokens is None else max(1, max_tokens // seq_len)
    # Spread over the whole stream: neighbouring windows come from the same few files.
    starts = np.unique(np.linspace(0, num_windows - 1, min(wanted, num_windows)).astype(int))
    for first in range(0, len(starts), sequences_per_batch):
        rows = np.stack(
            [
                tokens[start * seq_len : (start + 1) * seq_len + 1].astype(np.int64)
                for start in starts[first : first + sequences_per_batch]
            ]
        )
        yield np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
