"""What a config allows, what it says otherwise, and the paper's parameter counts."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling
from colm_serve.model.transformer import ColmModel
from tests.model.models import SMALL, VARIANTS


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("chains", (), "one or more positive integers"),
        ("chains", (2, 0), "one or more positive integers"),
        ("chains", (1.5, 2), "one or more positive integers"),
        ("vocab_size", 0, "a positive integer"),
        ("vocab_size", "97", "a positive integer"),
        ("num_layers", -1, "a positive integer"),
        ("num_layers", 2.0, "a positive integer"),
        ("max_context", True, "a positive integer"),
        ("kv_sharing", "earth", "air or per_chain"),
        ("kv_repeat", "none", "tile or interleave"),
        ("head", "two", "shared or per_level"),
        ("ffn", "relu", "swiglu or gelu"),
        ("rope_theta", 0.0, "a positive number"),
        ("rope_theta", "10000", "a positive number"),
        ("rms_norm_eps", -1e-5, "a positive number"),
        ("rms_norm_eps", float("inf"), "a positive number"),
        ("bos_token_id", SMALL.vocab_size, f"of token ids, 0 to {SMALL.vocab_size - 1}"),
        ("eos_token_ids", (2, SMALL.vocab_size), f"of token ids, 0 to {SMALL.vocab_size - 1}"),
        ("eos_token_ids", (True,), f"of token ids, 0 to {SMALL.vocab_size - 1}"),
        ("head_dim", 7, "an even number"),
        ("d_model", 62, "chains [2, 2, 4] divide evenly"),
        ("d_ff", 126, "chains [2, 2, 4] divide evenly"),
        ("num_heads", 6, "chains [2, 2, 4] divide evenly"),
        ("num_kv_heads", 4, "divides every chain's query heads (2, 2, 4)"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(
    key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(InvalidConfig) as error:
        replace(SMALL, **{key: value})
    shown = list(value) if isinstance(value, tuple) else value
    assert str(error.value).startswith(f"{key}: {shown!r} is not allowed; allowed: ")
    assert allowed in str(error.value)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("factor", 0.0, "a positive number"),
        ("original_max_context", None, "a positive number"),
        ("high_freq_factor", 1.0, "a number above low_freq_factor, 1.0"),
    ],
)
def test_a_rescaling_that_cannot_be_computed_is_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        Llama3RopeScaling(**{**asdict(Llama3RopeScaling(8.0, 1.0, 4.0, 64)), key: value})
    shown = f"rope_scaling.{key}: {value!r} is not allowed; allowed: {allowed}"
    assert str(error.value) == shown


def test_per_chain_kv_heads_must_divide_among_the_chains() -> None:
    with pytest.raises(InvalidConfig, match=r"num_kv_heads: 2 .* chains \[2, 2, 4\]"):
        replace(SMALL, kv_sharing="per_chain", num_kv_heads=2)


def test_a_head_per_level_cannot_be_the_embedding() -> None:
    with pytest.raises(InvalidConfig, match=r"tie_embeddings: True .* head is per_level"):
        replace(SMALL, head="per_level", tie_embeddings=True)


@pytest.mark.parametrize("level", [0, -1, 4])
def test_a_level_that_the_model_lacks_is_refused(level: int) -> None:
    with pytest.raises(InvalidConfig, match=rf"num_chains: {level} .* 1 to 3"):
        SMALL.check_level(level, "num_chains")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_config_is_read_back_equal(config: ColmConfig, tmp_path: Path) -> None:
    config = replace(config, bos_token_id=1, eos_token_ids=(2, 3))
    assert ColmConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path)
    assert ColmConfig.load(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"num_chain": 3}, "num_chain", r"num_chain: 3 .* only the keys .*'num_heads'"),
        ({"model_type": "llama"}, "model_type", "model_type: 'llama' .* allowed: colm"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling", "rope_scaling: .*low_freq_factor"),
        ({"rope_scaling": 8.0}, "rope_scaling", r"rope_scaling: 8\.0"),
        ({"chains": 4}, "chains", "chains: 4 .* list"),
        ({"eos_token_ids": 2}, "eos_token_ids", "eos_token_ids: 2 .* list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_file_s_key_that_is_not_allowed_is_named(
    change: dict[str, Any], key: str, expected: str
) -> None:
    with pytest.raises(InvalidConfig) as error:
        ColmConfig.from_dict({**SMALL.to_dict(), **change})
    assert error.value.key == key
    assert re.search(expected, str(error.value))


def test_a_missing_key_is_named() -> None:
    raw = SMALL.to_dict()
    del raw["vocab_size"]
    with pytest.raises(InvalidConfig, match="vocab_size"):
        ColmConfig.from_dict(raw)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_config_that_is_not_json_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        ColmConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["3", "[1]", "null", '"colm"'])
def test_a_config_that_is_no_json_object_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        ColmConfig.load(tmp_path)


def test_a_folder_without_config_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        ColmConfig.load(tmp_path)


def test_widths_are_split_in_the_chains_ratio() -> None:
    assert SMALL.chain_dims == (16, 16, 32)
    assert SMALL.chain_ff_dims == (32, 32, 64)
    assert SMALL.level_dims == (16, 32, 64)
    assert SMALL.heads_per_chain == (2, 2, 4)
    assert SMALL.kv_heads_per_chain == (2,)
    assert VARIANTS["per_chain"].kv_heads_per_chain == (1, 1, 2)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_num_params_is_what_the_model_holds(config: ColmConfig) -> None:
    for level in (1, 2, 3):
        held = sum(parameter.numel() for parameter in ColmModel(config, level).parameters())
        if config.head == "per_level":  # a level scores with its own matrix alone
            held -= config.vocab_size * sum(config.level_dims[: level - 1])
        assert config.num_params(level) == held


def _table_9(
    chains: tuple[int, ...],
    d_model: int = 2048,
    *,
    d_ff: int = 8192,
    num_layers: int = 16,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    vocab_size: int = 32000,
) -> ColmConfig:
    return ColmConfig(
        vocab_size=vocab_size,
        chains=chains,
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=d_model // num_heads,
        max_context=4096,
        kv_sharing="per_chain",
    )


# The table's counts are those of untied embeddings and K and V per chain; its models trained from
# scratch have the LLaMA-2 tokenizer's 32000 tokens, the expansions their base model's vocabulary.
@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (
            _table_9((32, 8), 2560, d_ff=10240, num_heads=40, num_kv_heads=10, vocab_size=128256),
            1.93,
        ),
        (_table_9((32, 8), 2560, d_ff=7040, num_layers=22, num_heads=40, num_kv_heads=5), 1.44),
        (_table_9((32,)), 1.10),
        (_table_9((16, 16)), 0.86),
        (_table_9((8, 24)), 0.92),
        (_table_9((8, 8, 16)), 0.80),
        (_table_9((8, 8, 8, 8)), 0.74),
    ],
    ids=lambda value: str(value.chains) if isinstance(value, ColmConfig) else None,
)
def test_num_params_is_table_9_s(config: ColmConfig, billions: float) -> None:
    assert round(config.num_params() / 1e9, 2) == billions


# 1.116 and 1.188 billion: the table gives these two without their last digit, not rounded.
@pytest.mark.parametrize(
    ("config", "hundredths"),
    [(_table_9((16, 16), 2560), 111), (_table_9((8, 8, 8, 8), 3072), 118)],
    ids=["16-16-same-params", "8-8-8-8-same-params"],
)
def test_num_params_is_table_9_s_cut_to_two_digits(config: ColmConfig, hundredths: int) -> None:
    assert config.num_params() // 10**7 == hundredths


def test_air_shares_chain_1_s_keys_and_values_with_every_chain() -> None:
    per_chain = _table_9((8, 8, 8, 8))
    air = replace(per_chain, kv_sharing="air")
    # Chain i's own would read i * 512 columns for 2 of the 8 heads; Air's read 512 for all 8.
    saved = 16 * 2 * 64 * (2 * (512 + 1024 + 1536 + 2048) - 8 * 512)
    assert per_chain.num_params() - air.num_params() == saved


def test_rope_scaling_is_read_from_its_own_object() -> None:
    config = VARIANTS["air-rope_scaling"]
    assert config.to_dict()["rope_scaling"]["factor"] == 8.0
    assert ColmConfig.from_dict(config.to_dict()).rope_scaling == Llama3RopeScaling(8, 1, 4, 32)
