"""The configurations of LLaMA 2, 3 and 3.x and TinyLlama, in the forms they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from colm_serve.convert.hf_config import hf_config, read_hf_config
from colm_serve.errors import CheckpointError
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}
#: LLaMA 2's first release knew neither grouped heads nor theta nor biases.
LLAMA_2 = {
    key: TINY_LLAMA[key]
    for key in (
        "architectures", "bos_token_id", "eos_token_id", "hidden_act", "model_type",
        "rms_norm_eps", "rope_scaling", "tie_word_embeddings", "torch_dtype", "vocab_size",
    )
} | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}  # fmt: skip
SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2 = TINY_LLAMA | {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def write_config(folder: Path, **raw: object) -> Path:
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    return folder


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_tiny_llama(tmp_path: Path) -> None:
    assert read_hf_config(write_config(tmp_path, **TINY_LLAMA)) == ColmConfig(
        vocab_size=32000, chains=(1,), d_model=2048, d_ff=5632, num_layers=22, num_heads=32,
        num_kv_heads=4, head_dim=64, max_context=2048, kv_repeat="interleave",
        bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


def test_llama_2(tmp_path: Path) -> None:
    config = read_hf_config(write_config(tmp_path, **LLAMA_2))
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)
    assert config.num_params() == 6_738_415_616


def test_llama_3_2(tmp_path: Path) -> None:
    config = read_hf_config(write_config(tmp_path, **LLAMA_3_2))
    assert config.rope_scaling == Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 500000.0
    assert config.tie_embeddings
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.num_params() == 1_235_814_400


@pytest.mark.parametrize("raw", [TINY_LLAMA, LLAMA_2, LLAMA_3_2], ids=["tiny", "2", "3.2"])
def test_each_release_s_form_says_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    expected = read_hf_config(write_config(tmp_path, **raw))
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    newer = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert "rope_parameters" in newer
    assert read_hf_config(write_config(tmp_path, **newer)) == expected
    ours = hf_config(expected, "bfloat16")
    assert read_hf_config(write_config(tmp_path, **ours)) == expected


def test_the_oldest_name_of_the_rope_type(tmp_path: Path) -> None:
    scaling = {**without(SCALING, "rope_type"), "type": "llama3"}
    found = read_hf_config(write_config(tmp_path, **{**LLAMA_3_2, "rope_scaling": scaling}))
    assert found == read_hf_config(write_config(tmp_path, **LLAMA_3_2))


def test_what_is_left_out_has_transformers_default(tmp_path: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    raw = {key: TINY_LLAMA[key] for key in ("model_type", "vocab_size", *sizes)}
    config = read_hf_config(write_config(tmp_path, **raw))
    llama = LlamaConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == llama.num_key_value_heads
    assert config.head_dim == llama.head_dim
    assert config.max_context == llama.max_position_embeddings
    assert config.rms_norm_eps == llama.rms_norm_eps
    assert config.rope_theta == llama.rope_parameters["rope_theta"]
    assert config.tie_embeddings == llama.tie_word_embeddings
    assert config.bos_token_id == llama.bos_token_id
    assert config.eos_token_ids == (llama.eos_token_id,)


def test_chats_end_as_generation_config_says(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        **LLAMA_3_2,
    )
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [128001, 128009]}', "utf-8")
    assert read_hf_config(tmp_path).eos_token_ids == (128001, 128009)
    path.write_text('{"temperature": 0.6}', "utf-8")
    assert read_hf_config(tmp_path).eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures: ['MistralForCausalLM']; "
         "supported: only ['LlamaForCausalLM']"),
        ({"model_type": "qwen2"}, "model_type: 'qwen2'; supported: only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; supported: only 'silu'"),
        ({"attention_bias": True}, "attention_bias: True; supported: only False"),
        ({"mlp_bias": True}, "mlp_bias: True; supported: only False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}; "
         "supported: only None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type: 'yarn'; "
         "supported: 'default' and 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: 'linear'; "
         "supported: 'default' and 'llama3'"),
        ({"rope_scaling": {**SCALING, "factor": "8"}}, "rope_scaling.factor: '8'; "
         "supported: a value of type float"),
        ({"rope_scaling": without(SCALING, "factor")}, "rope_scaling.factor: nothing; "
         "supported: a value of type float"),
        ({"rope_scaling": {**SCALING, "factor": 0.0}}, "makes no CoLM: rope_scaling.factor: 0.0"),
        ({"rope_theta": -1.0}, "makes no CoLM: rope_theta: -1.0"),
        ({"rope_scaling": 8}, "rope_scaling: 8; supported: a value of type dict"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None},
         "rope_parameters.partial_rotary_factor: 0.5; supported: only 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan; supported: a finite number"),
        ({"hidden_size": None}, "hidden_size: None; supported: a value of type int"),
        ({"num_key_value_heads": 5}, "num_kv_heads: 5 is not allowed"),
        ({"head_dim": 63}, "head_dim: 63 is not allowed"),
        ({"num_attention_heads": 0}, "num_heads: 0 is not allowed"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>'; supported: a token id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_no_llama_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **{**TINY_LLAMA, **changes})
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
