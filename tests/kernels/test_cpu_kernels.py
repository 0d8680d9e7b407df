"""The CPU's small kernels against their torch references."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from colm_serve.kernels import paged_attention, paged_attention_cpu, rms_norm
from colm_serve.kernels.math_cpu import exp, sigmoid
from colm_serve.kernels.rms_norm_cpu import chain_rms_norm
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope import rotate, rotation_table

PAGE_SIZE, N, H = 4, 2, 8


@njit
def exp_of(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = exp(x[i])


@njit
def sigmoid_of(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = sigmoid(x[i])


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-90, 90, 20001, dtype=np.float32)
    out = np.empty_like(x)
    exp_of(x, out)
    expected = np.exp(np.clip(x.astype(np.float64), -87, 88))
    assert np.abs(out / expected - 1).max() < 2.4e-7


def test_sigmoid_goes_to_its_limits() -> None:
    x = np.array([-200, -30, 0, 30, 200], dtype=np.float32)
    out = np.empty_like(x)
    sigmoid_of(x, out)
    np.testing.assert_allclose(out, [0, 9.357623e-14, 0.5, 1, 1], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("threads", [1, 3])
def test_rms_norm_touches_each_chain_s_rows_alone(threads: int) -> None:
    dims, num_rows = (8, 4, 20), (7, 3, 1)
    x, gains = torch.randn(7, 32), [torch.randn(d) for d in dims]
    out = torch.zeros(7, 32)
    chain_rms_norm(
        x.numpy(), torch.cat(gains).numpy(), np.array([0, 8, 12, 32]), np.array(num_rows), 1e-5,
        out.numpy(), threads,
    )  # fmt: skip
    expected = rms_norm.chain_rms_norm(x, gains, num_rows, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_rotation_and_store() -> None:
    config = ColmConfig(16, (1,), 16, 16, 1, 4, N, H, max_context=32)
    rotations = rotation_table(config)
    num_heads, positions, slots = [4, 4, 2], [0, 9, 31], [5, 0, 11]
    qkv = torch.randn(3, 4 + 2 * N, H)
    before = qkv.clone()
    k_v = torch.zeros(2, 12, N, H)
    paged_attention_cpu.rotate_and_store(
        qkv.numpy(), np.array(num_heads), 4, np.array(positions), np.array(slots),
        rotations.numpy(), k_v[0].numpy(), k_v[1].numpy(), 2,
    )  # fmt: skip
    rotated = rotate(before[:, : 4 + N], rotations[positions])
    for row, heads in enumerate(num_heads):
        torch.testing.assert_close(qkv[row, :heads], rotated[row, :heads])
        assert torch.equal(qkv[row, heads:4], before[row, heads:4]), "heads the level lacks"
        torch.testing.assert_close(k_v[0, slots[row]], rotated[row, 4:])
        assert torch.equal(k_v[1, slots[row]], before[row, 4 + N :])
    assert torch.equal(k_v[:, [1, 2, 3, 4]], torch.zeros(2, 4, N, H)), "slots of others"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_over_scattered_pages(threads: int) -> None:
    torch.manual_seed(0)
    tables = [[3, 0, 7], [1], [6, 2, 5, 4]]
    positions, num_heads = [10, 0, 14], [8, 4, 2]
    k_v = torch.randn(2, 8 * PAGE_SIZE, N, H)
    q, out = torch.randn(3, 8 + 2 * N, H), torch.full((3, 8, H), -1.0)
    all_pages = np.array([page for pages in tables for page in pages])
    paged_attention_cpu.attend(
        q.numpy(), np.arange(3), np.array(num_heads), np.array(positions), np.array([0, 3, 4]),
        all_pages, PAGE_SIZE, k_v[0].numpy(), k_v[1].numpy(), out.numpy(), threads,
    )  # fmt: skip
    for row, (pages, heads) in enumerate(zip(tables, num_heads, strict=True)):
        slots = [page * PAGE_SIZE + i for page in pages for i in range(PAGE_SIZE)]
        k_SNH, v_SNH = k_v[:, slots[: positions[row] + 1]]
        expected = paged_attention.attend(q[row : row + 1, :heads], k_SNH, v_SNH)[0]
        torch.testing.assert_close(out[row, :heads], expected, rtol=1e-5, atol=1e-6)
        assert (out[row, heads:] == -1).all(), "heads the level lacks"


def test_the_reference_is_causal_and_reads_heads_in_tile_order() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2 * N, H), torch.randn(5, N, H), torch.randn(5, N, H)
    for row in range(3):
        seen = 3 + row
        for head in range(2 * N):
            scores = k[:seen, head % N] @ q[row, head] / H**0.5
            expected = scores.softmax(0) @ v[:seen, head % N]
            torch.testing.assert_close(paged_attention.attend(q, k, v)[row, head], expected)
    torch.testing.assert_close(
        paged_attention.attend(q[2:], k, v), paged_attention.attend(q, k, v)[2:]
    )


def test_the_kernels_leave_torch_its_number_of_threads() -> None:
    program = (
        "import torch; torch.set_num_threads(1);"
        "import colm_serve.model.cpu_model; assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
