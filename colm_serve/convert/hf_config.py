"""Hugging Face's LlamaForCausalLM configuration as a one-chain CoLM's, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.json_file import JsonObject, read_json
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_ARCHITECTURE = "LlamaForCausalLM"
#: What a CoLM cannot have, and the values at which a LLaMA does not have it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "architectures": (None, [_ARCHITECTURE]),
    "model_type": ("llama",),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
}
#: Keys of LLaMA 3's rescaling there, by our names.
_LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_context": "original_max_position_embeddings",
}


def read_hf_config(folder: Path) -> ColmConfig:
    """Read `folder/config.json`, and from generation_config.json if there what ends a text.

    What is left out has LLaMA's default.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not one that a CoLM of one
            chain can be; the message names file, key, value and what is supported.
    """
    raw = read_json(folder / CONFIG_FILE)
    _check_neutral(raw)
    d_model, num_heads = raw.get("hidden_size", int), raw.get("num_attention_heads", int)
    max_context = raw.get("max_position_embeddings", int, 2048)
    try:
        rope_theta, rope_scaling = _read_rope(raw, max_context)
        return ColmConfig(
            vocab_size=raw.get("vocab_size", int),
            chains=(1,),
            d_model=d_model,
            d_ff=raw.get("intermediate_size", int),
            num_layers=raw.get("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads", int, num_heads),
            head_dim=raw.get("head_dim", int, d_model // max(num_heads, 1)),
            max_context=max_context,
            kv_repeat="interleave",
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=raw.get("rms_norm_eps", float, 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", bool, False),
            bos_token_id=next(iter(_token_ids(raw, "bos_token_id", 1)), None),
            eos_token_ids=_read_eos(raw, folder / GENERATION_FILE),
        )
    except InvalidConfig as error:
        raise CheckpointError(f"{raw.path}: makes no CoLM: {error}") from error


def hf_config(config: ColmConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json, in the older form, which newer releases read too.

    Args:
        config: of one chain, and a LLaMA's in all else.
        dtype: torch's name of what the tensors are stored in.
    """
    scaling = None
    if config.rope_scaling is not None:
        numbers = {key: getattr(config.rope_scaling, own) for own, key in _LLAMA3_KEYS.items()}
        scaling = {"rope_type": "llama3", **numbers}
    eos = config.eos_token_ids
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype,
    }


def _check_neutral(raw: JsonObject) -> None:
    for key, neutral in _NEUTRAL.items():
        if raw.get_any(key) not in neutral:
            raise raw.unsupported(key, f"only {neutral[-1]!r}")


def _read_rope(raw: JsonObject, max_context: int) -> tuple[float, Llama3RopeScaling | None]:
    """theta and rescaling; newer releases write both into `rope_parameters`."""
    older = raw.get_any("rope_scaling")
    rope = raw.inner("rope_scaling" if older else "rope_parameters")
    theta = rope.get("rope_theta", float, raw.get("rope_theta", float, 10000.0))
    if rope.get_any("partial_rotary_factor", 1) != 1:
        raise rope.unsupported("partial_rotary_factor", "only 1")
    type_key = "rope_type" if rope.get_any("rope_type") else "type"
    match rope.get_any(type_key, "default"):
        case "default":
            return theta, None
        case "llama3":
            return theta, Llama3RopeScaling(
                factor=rope.get("factor", float),
                low_freq_factor=rope.get("low_freq_factor", float),
                high_freq_factor=rope.get("high_freq_factor", float),
                original_max_context=rope.get("original_max_position_embeddings", int, max_context),
            )
    raise rope.unsupported(type_key, "'default' and 'llama3'")


def _read_eos(raw: JsonObject, generation_file: Path) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's, which chat models have more of."""
    source = raw
    if generation_file.exists():
        generation = read_json(generation_file)
        if generation.get_any("eos_token_id") is not None:
            source = generation
    return _token_ids(source, "eos_token_id", 2)


def _token_ids(raw: JsonObject, key: str, default: int) -> tuple[int, ...]:
    """One, several or (null) none."""
    found = raw.get_any(key, default)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in listed):
        raise raw.unsupported(key, "a token id, a list of them, or null")
    return tuple(listed)
