"""Mass kept and keys read, against counts by hand."""

from __future__ import annotations

import numpy as np
import torch

from colm_serve.engine.sparse.head_keys import BlockGrid, HeadKeys, build_index
from colm_serve.engine.sparse.mass import keys_read, mass_kept


def test_flat_attention_keeps_the_share_of_keys_that_is_read() -> None:
    """Two heads of one kv head, 64 rows after 128 tokens; equal keys share the mass equally."""
    grid = BlockGrid(128, 192)
    own = np.array([[False, False, True]])
    index = build_index(grid, [HeadKeys.of_blocks(own), HeadKeys(own, np.arange(32))])
    q_TQH, k_SNH = torch.randn(64, 2, 8), torch.ones(192, 1, 8)
    visible = torch.arange(129.0, 193.0)
    in_own_block = torch.arange(1.0, 65.0)
    expected = torch.stack([in_own_block / visible, (in_own_block + 32) / visible], dim=1).mean(0)
    torch.testing.assert_close(mass_kept(q_TQH, k_SNH, [index])[0], expected)
    assert keys_read(index, grid).tolist() == [64 / 192, 96 / 192]
