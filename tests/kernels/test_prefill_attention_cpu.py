"""The blocked CPU kernel against the torch references, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from colm_serve.kernels.paged_attention import attend
from colm_serve.kernels.prefill_attention_cpu import Rows, attend_span
from colm_serve.kernels.sparse_attention import BLOCK, SparseIndex, attend_sparse

FIRST_ROW = 3


@dataclass(frozen=True)
class Case:
    """A span behind other rows of its batch, its keys and values on scattered pages."""

    num_rows: int
    start: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True)
class Inputs:
    q_TMH: Tensor
    pool: Tensor
    pages: np.ndarray
    slots: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Slots that no token stands in are NaN, so that reading one of them shows."""
        generator = torch.Generator().manual_seed(0)
        num_pages = -(-case.stop // case.page_size)
        pages = torch.randperm(2 * num_pages, generator=generator)[:num_pages]
        slots = (pages[:, None] * case.page_size + torch.arange(case.page_size)).flatten()
        shape = (2, 2 * num_pages * case.page_size, case.num_kv_heads, case.head_dim)
        pool = torch.full(shape, float("nan"))
        slots = slots[: case.stop]
        pool[:, slots] = torch.randn(2, case.stop, *shape[2:], generator=generator)
        num_heads = case.num_heads + 2 * case.num_kv_heads
        num_rows = FIRST_ROW + case.num_rows
        q_TMH = torch.randn(num_rows, num_heads, case.head_dim, generator=generator)
        return cls(q_TMH, pool, pages.numpy(), slots)

    def compute(self, case: Case, index: SparseIndex | None = None, num_threads: int = 2) -> Tensor:
        out_TQH = torch.full((len(self.q_TMH), case.num_heads + 1, case.head_dim), float("nan"))
        rows = Rows(FIRST_ROW, case.num_rows, case.start, case.num_heads)
        attend_span(
            self.q_TMH.numpy(), rows, self.pages, case.page_size, self.pool[0].numpy(),
            self.pool[1].numpy(), index, out_TQH.numpy(), num_threads,
        )  # fmt: skip
        assert out_TQH[:FIRST_ROW].isnan().all(), "rows of others"
        assert out_TQH[:, case.num_heads].isnan().all(), "heads that the level lacks"
        return out_TQH[FIRST_ROW:, : case.num_heads]

    def reference(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        q_TQH = self.q_TMH[FIRST_ROW:, : case.num_heads]
        return q_TQH, self.pool[0, self.slots], self.pool[1, self.slots]


CASES = [
    *(Case(num_rows, start) for num_rows in (1, 16, 64, 100, 257) for start in (0, 1, 63, 190)),
    *(Case(70, 33, num_heads=2 * repeats) for repeats in (1, 2, 3)),
    *(Case(40, 50, num_heads=12, num_kv_heads=n) for n in (1, 3, 12)),
    *(Case(40, 50, head_dim=head_dim) for head_dim in (2, 8, 12, 64, 128)),
    *(Case(150, 9, page_size=page_size) for page_size in (1, 5, 128)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_key(case: Case) -> None:
    inputs = Inputs.of(case)
    expected = attend(*inputs.reference(case))
    torch.testing.assert_close(inputs.compute(case), expected, rtol=1e-4, atol=1e-5)


def test_scores_far_apart() -> None:
    case = Case(100, 200)
    inputs = Inputs.of(case)
    inputs.q_TMH.mul_(100)
    expected = attend(*inputs.reference(case))
    torch.testing.assert_close(inputs.compute(case), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 3, 7, 100])
def test_threads_do_not_change_a_bit(num_threads: int) -> None:
    case = Case(200, 77)
    inputs = Inputs.of(case)
    assert torch.equal(inputs.compute(case, num_threads=num_threads), inputs.compute(case))


@pytest.mark.parametrize("cut", [1, 64, 100, 299])
def test_a_row_has_the_same_bits_in_any_chunk(cut: int) -> None:
    whole = Case(300, 0)
    inputs = Inputs.of(whole)
    expected = inputs.compute(whole)
    tail = Case(300 - cut, cut)
    q_TMH = inputs.q_TMH[cut:].clone()
    actual = Inputs(q_TMH, inputs.pool, inputs.pages, inputs.slots).compute(tail)
    assert torch.equal(actual, expected[cut:])


def make_index(case: Case, share: float, num_columns: int) -> SparseIndex:
    """Random key blocks and columns, other ones for each head and query block; own ones always."""
    random = np.random.default_rng(0)
    num_blocks = -(-case.num_rows // BLOCK)
    starts = np.zeros((2, case.num_heads, num_blocks + 1), dtype=np.int64)
    chosen: tuple[list[int], list[int]] = ([], [])
    for head in range(case.num_heads):
        starts[:, head, 0] = len(chosen[0]), len(chosen[1])
        for block in range(num_blocks):
            first = case.start + block * BLOCK
            stop = min(first + BLOCK, case.stop)
            key_blocks = np.flatnonzero(random.random(-(-stop // BLOCK)) < share).tolist()
            own = range(first // BLOCK, -(-stop // BLOCK))
            blocks = sorted({*key_blocks, *own})
            free = [p for p in range(stop) if p // BLOCK not in blocks]
            columns = random.permutation(free)[:num_columns].astype(int).tolist()
            chosen[0].extend(blocks)
            chosen[1].extend(sorted(columns))
            starts[:, head, block + 1] = len(chosen[0]), len(chosen[1])
    flat = [np.array(values, dtype=np.int32) for values in chosen]
    return SparseIndex(starts[0], flat[0], starts[1], flat[1])


@pytest.mark.parametrize(
    "case", [Case(300, 0), Case(300, 100), Case(1, 700), Case(64, 640)], ids=str
)
@pytest.mark.parametrize("num_columns", [0, 5, 300])
@pytest.mark.parametrize("share", [0, 0.4])
def test_the_keys_of_an_index(case: Case, num_columns: int, share: float) -> None:
    index, inputs = make_index(case, share, num_columns), Inputs.of(case)
    expected = attend_sparse(*inputs.reference(case), index)
    actual = inputs.compute(case, index)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(inputs.compute(case, index, num_threads=5), actual)


@pytest.mark.parametrize("case", [Case(300, 0), Case(300, 100), Case(64, 640)], ids=str)
def test_every_block_of_an_index_is_dense_attention(case: Case) -> None:
    inputs = Inputs.of(case)
    assert torch.equal(inputs.compute(case, make_index(case, 1, 0)), inputs.compute(case))
