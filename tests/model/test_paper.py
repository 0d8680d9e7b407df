"""Every level of every variant is the model that the paper's pseudo code describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from colm_serve.model.checkpoint import load_model
from tests.helpers import make_prompt
from tests.model.models import VARIANTS, read_chain
from tests.model.paper import PaperModel


# LLaMA 3's rescaling is no part of the paper; the parity tests hold it.
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("variant", [v for v, c in VARIANTS.items() if c.rope_scaling is None])
@torch.no_grad()
def test_a_level_s_scores_are_the_paper_s(
    folder_of: Callable[[str], Path], variant: str, level: int
) -> None:
    folder = folder_of(variant)
    tokens = torch.tensor(make_prompt(9))
    chains = [read_chain(folder, chain)[0] for chain in range(1, level + 1)]
    expected = PaperModel(VARIANTS[variant], chains).logits(tokens)
    model = load_model(folder, level).model
    found = model.logits(model.hidden_states(tokens[None]), [len(tokens)] * level)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
