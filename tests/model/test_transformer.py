"""Levels do not leak into each other, and a prefill does what a forward does and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colm_serve.errors import InvalidConfig
from colm_serve.model.checkpoint import load_model
from colm_serve.model.transformer import ColmModel, level_rows
from tests.engine.paged import RecordingContext, kv_of_whole_model, open_chain_1
from tests.helpers import whole_model
from tests.model.models import AIR, SMALL, VARIANTS, random_model

SEQ_LEN = 12
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def _token_ids(num_sequences: int, seq_len: int = SEQ_LEN) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(SMALL.vocab_size, (num_sequences, seq_len), generator=generator)


def _run(model: ColmModel, token_ids_BS: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, S, D] and logits [B, S, V] of sequences at these levels."""
    shape = token_ids_BS.shape
    x_TD = model.hidden_states(token_ids_BS, levels)
    logits_TV = model.logits(x_TD, [rows * shape[1] for rows in level_rows(levels)])
    return x_TD.unflatten(0, shape), logits_TV.unflatten(0, shape)


def _without_grad(model: ColmModel, token_ids_BS: Tensor, levels: Sequence[int]) -> list[Tensor]:
    with torch.no_grad():
        return list(_run(model, token_ids_BS, levels))


@pytest.mark.parametrize("levels", [(3, 2, 1), (3, 3, 1, 1), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_level_alone_equals_that_level_in_a_mixed_batch(
    folder_of: Callable[[str], Path], variant: str, levels: tuple[int, ...]
) -> None:
    folder = folder_of(variant)
    token_ids = _token_ids(len(levels))
    mixed_x, mixed_logits = _without_grad(whole_model(folder), token_ids, levels)
    for row, level in enumerate(levels):
        width = SMALL.level_dims[level - 1]
        first_files = load_model(folder, level).model
        x, logits = _without_grad(first_files, token_ids[row : row + 1], [level])
        assert x.shape[-1] == width
        close(mixed_x[row, :, :width], x[0])
        close(mixed_logits[row], logits[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_give_different_scores(folder_of: Callable[[str], Path], variant: str) -> None:
    _, logits = _without_grad(
        whole_model(folder_of(variant)), _token_ids(1).repeat(3, 1), [3, 2, 1]
    )
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert (logits[1] - logits[2]).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_levels_scores_each_level_as_if_alone(
    folder_of: Callable[[str], Path], variant: str
) -> None:
    model = whole_model(folder_of(variant))
    token_ids = _token_ids(2)
    assert model.head is not None
    with torch.no_grad():
        x_TD = model.hidden_states(token_ids)
        scores = model.head.all_levels(x_TD)
    assert len(scores) == 3
    for level, score_TV in enumerate(scores, start=1):
        _, logits = _without_grad(model, token_ids, [level] * 2)
        close(score_TV, logits.flatten(0, 1))


@pytest.mark.parametrize("chain", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_changes_its_own_and_higher_levels_only(variant: str, chain: int) -> None:
    model = random_model(VARIANTS[variant])
    token_ids = _token_ids(1)
    before = [_without_grad(model, token_ids, [level]) for level in (1, 2, 3)]
    _redraw_chain(model, chain)
    after = [_without_grad(model, token_ids, [level]) for level in (1, 2, 3)]
    for level in (1, 2, 3):
        (old_x, old_logits), (x, logits) = before[level - 1], after[level - 1]
        if level < chain:
            assert torch.equal(x, old_x)
            assert torch.equal(logits, old_logits)
        else:
            lower = SMALL.level_dims[chain - 2]
            close(x[..., :lower], old_x[..., :lower])
            assert (x[..., lower:] - old_x[..., lower:]).abs().max() > 0.1
            assert (logits - old_logits).abs().max() > 0.1


@torch.no_grad()
def _redraw_chain(model: ColmModel, chain: int) -> None:
    for module in model.modules():
        weights = getattr(module, "weights", None)
        if isinstance(weights, nn.ParameterList) and chain <= len(weights):
            weights[chain - 1].normal_()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_does_not_change_what_comes_before_it(
    folder_of: Callable[[str], Path], variant: str
) -> None:
    model = whole_model(folder_of(variant))
    token_ids = _token_ids(3)
    changed = token_ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % SMALL.vocab_size
    _, logits = _without_grad(model, token_ids, [3, 2, 1])
    _, changed_logits = _without_grad(model, changed, [3, 2, 1])
    assert torch.equal(logits[:, :7], changed_logits[:, :7])
    assert (logits[:, 7:] - changed_logits[:, 7:]).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("levels", [(3, 3), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_path_equals_the_path_without(variant: str, levels: tuple[int, ...]) -> None:
    model = random_model(VARIANTS[variant])
    token_ids = _token_ids(len(levels))
    x, logits = _run(model, token_ids, levels)
    assert logits.requires_grad
    expected_x, expected_logits = _without_grad(model, token_ids, levels)
    close(x.detach(), expected_x)
    close(logits.detach(), expected_logits)


def _gradients(model: ColmModel, levels: Sequence[int]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    token_ids = _token_ids(len(levels))
    _, logits = _run(model, token_ids, levels)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_lower_level_s_loss_leaves_higher_chains_alone() -> None:
    model = random_model(SMALL)
    gradients = _gradients(model, [2])
    for name, gradient in gradients.items():
        chain = int(name.rsplit(".", 1)[1]) + 1
        reached = gradient is not None and bool(gradient.any())
        assert reached == (chain <= 2), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_activations_give_the_same_gradients(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    expected = _gradients(model, [3, 2, 1])
    model.recompute_activations = True
    runs = _count_runs(model)
    found = _gradients(model, [3, 2, 1])
    assert runs.count("blocks.0.ffn") == 2, "nothing was recomputed"
    for name, gradient in expected.items():
        assert gradient is not None
        close(found[name], gradient)


def _count_runs(model: ColmModel) -> list[str]:
    """A list that takes the name of every module that runs."""
    runs: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    return runs


def _prefill(model: ColmModel, token_ids_T: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    context = RecordingContext(model.config, len(token_ids_T))
    with torch.no_grad():
        model.prefill(token_ids_T, torch.arange(len(token_ids_T)), context)
    return context.stored


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
@pytest.mark.parametrize("variant", AIR)
def test_chain_1_prefills_bit_for_bit_what_the_model_stores_at_every_level(
    folder_of: Callable[[str], Path], variant: str, num_tokens: int
) -> None:
    folder = folder_of(variant)
    token_ids = _token_ids(1, num_tokens)[0]
    prefilled = _prefill(open_chain_1(folder).model, token_ids)
    assert prefilled.keys() == {0, 1, 2}
    for level in (1, 2, 3):
        stored = kv_of_whole_model(folder, token_ids.tolist(), level)
        for layer, (k_TNH, v_TNH) in prefilled.items():
            assert k_TNH.shape == (num_tokens, SMALL.num_kv_heads, SMALL.head_dim)
            assert torch.equal(k_TNH, stored[layer][0])
            assert torch.equal(v_TNH, stored[layer][1])


@pytest.mark.parametrize("variant", ["per_chain", "per_chain-interleave"])
def test_without_air_a_higher_level_stores_more_than_chain_1_makes(
    folder_of: Callable[[str], Path], variant: str
) -> None:
    folder = folder_of(variant)
    tokens = _token_ids(1)[0].tolist()
    num_heads = [kv_of_whole_model(folder, tokens, level)[0][0].shape[1] for level in (1, 2, 3)]
    assert num_heads == [1, 2, 4]


@pytest.mark.parametrize("num_chains", [1, 3])
def test_a_prefill_runs_no_more_of_the_last_layer_than_keys_and_values(
    folder_of: Callable[[str], Path], num_chains: int
) -> None:
    model = load_model(folder_of("air"), num_chains, with_head=num_chains > 1).model
    runs = _count_runs(model)
    _prefill(model, _token_ids(1)[0])
    assert [name for name in runs if name.startswith("blocks.2")] == [
        "blocks.2.attn_norm", "blocks.2.attn.wk", "blocks.2.attn.wv",
    ]  # fmt: skip
    assert {"blocks.1.attn.wq", "blocks.1.attn.wo", "blocks.1.ffn.w2"} <= set(runs)
    assert not {"norm", "head"} & set(runs)


def test_a_model_without_head_holds_no_classifier_and_no_final_norm() -> None:
    model = ColmModel(SMALL, 1, with_head=False)
    assert model.norm is None
    assert model.head is None
    assert not [name for name, _ in model.named_parameters() if name.startswith(("norm", "head"))]


@pytest.mark.parametrize("num_chains", [0, 4])
def test_a_model_has_no_more_chains_than_its_config(num_chains: int) -> None:
    with pytest.raises(InvalidConfig, match=f"num_chains: {num_chains} .* 1 to 3"):
        ColmModel(SMALL, num_chains)


@pytest.mark.parametrize(
    ("levels", "rows"),
    [
        ([], ()),
        ([1], (1,)),
        ([3], (1, 1, 1)),
        ([3, 1, 1], (3, 1, 1)),
        ([3, 3, 2, 1], (4, 3, 2)),
        ([2, 2], (2, 2)),
        ([3, 3, 1], (3, 2, 2)),
    ],
)
def test_level_rows_counts_the_leading_rows_of_each_chain(
    levels: list[int], rows: tuple[int, ...]
) -> None:
    assert level_rows(levels) == rows


def test_level_rows_wants_the_highest_level_first() -> None:
    with pytest.raises(AssertionError, match="highest level first"):
        level_rows([1, 3])
