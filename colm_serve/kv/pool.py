"""The memory of a KV cache: every layer's keys and values in pages.

Shapes: S tokens, N kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from colm_serve.core import KvLayout
from colm_serve.kernels import huge_pages

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BlockTable:
    """The pages of one sequence, in the order of its tokens."""

    pages: tuple[int, ...]
    page_size: int

    @cached_property
    def page_array(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The pages as int64, for kernels."""
        return np.array(self.pages, dtype=np.int64)

    @cached_property
    def _runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, first slot, number of tokens) of each run of neighbouring pages."""
        runs: list[tuple[int, int, int]] = []
        size = self.page_size
        for index, page in enumerate(self.pages):
            if runs and runs[-1][1] + runs[-1][2] == page * size:
                token, slot, length = runs[-1]
                runs[-1] = (token, slot, length + size)
            else:
                runs.append((index * size, page * size, size))
        return tuple(runs)

    def slots(self, start: int, stop: int) -> Iterator[slice]:
        """Where tokens [start, stop) lie in the pool: slices of slots, neighbours joined."""
        assert 0 <= start <= stop <= len(self.pages) * self.page_size, "tokens beyond the pages"
        for token, slot, length in self._runs:
            first, last = max(start, token), min(stop, token + length)
            if first < last:
                yield slice(slot + first - token, slot + last - token)


class KvPool:
    """Keys and values of `num_pages` pages in each layer, allocated once."""

    def __init__(
        self,
        layout: KvLayout,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (
            layout.num_layers, 2, num_pages * page_size, layout.num_kv_heads, layout.head_dim,
        )  # fmt: skip
        # Zeroed, so that every page is faulted in before the first request, not during it.
        dtype = _DTYPES[layout.dtype]
        if torch.device(device).type == "cpu":
            self._slots = huge_pages.zeros(shape, dtype)
        else:
            self._slots = torch.zeros(shape, dtype=dtype, device=device)

    @cached_property
    def array(self) -> np.ndarray:
        """On a CPU, the memory itself, [layers, K and V, slots, N, H]; for kernels."""
        array: np.ndarray = self._slots.numpy()
        return array

    @property
    def num_bytes_per_token(self) -> int:
        """K and V of one token in one layer."""
        return self.layout.num_elements_per_token * self._slots.element_size()

    def are_numbers(self, table: BlockTable, start: int, stop: int) -> bool:
        """Whether what the model made of tokens [start, stop) is finite.

        A NaN or inf of any layer stays in a token's hidden state, so the last layer's keys and
        values have it too.
        """
        # Both are NaN if any is one. A tenth of the time that `isfinite` takes.
        ends = [torch.aminmax(self._slots[-1, :, slots]) for slots in table.slots(start, stop)]
        return all(bool(low.isfinite()) and bool(high.isfinite()) for low, high in ends)

    def table(self, pages: Sequence[int]) -> BlockTable:
        return BlockTable(tuple(pages), self.page_size)

    def write(
        self, layer: int, table: BlockTable, start: int, k_SNH: Tensor, v_SNH: Tensor
    ) -> None:
        """Put keys and values of tokens [start, start + S) into their pages."""
        done = 0
        for slots in table.slots(start, start + k_SNH.shape[0]):
            length = slots.stop - slots.start
            self._slots[layer, 0, slots] = k_SNH[done : done + length]
            self._slots[layer, 1, slots] = v_SNH[done : done + length]
            done += length

    def read(self, layer: int, table: BlockTable, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [start, stop), each [S, N, H]; a view when neighbours."""
        parts = [self._slots[layer, :, slots] for slots in table.slots(start, stop)]
        k_v = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return k_v[0], k_v[1]

    def read_keys(self, layer: int, table: BlockTable, stop: int) -> Tensor:
        """Keys of tokens [0, stop), [S, N, H]; a view when neighbours."""
        parts = [self._slots[layer, 0, slots] for slots in table.slots(0, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
