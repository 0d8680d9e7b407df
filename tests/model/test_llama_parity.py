"""A CoLM of one chain is LLaMA: the same weights give the same logits and the same text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from colm_serve.model.chain_file import write_chain
from colm_serve.model.checkpoint import load_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.rope_scaling import Llama3RopeScaling
from tests.engine.paged import PAGES, decode, open_chain_1, poisoned_pool, prefill
from tests.helpers import generate_alone, make_prompt, whole_model

ONE_CHAIN = ColmConfig(
    vocab_size=97,
    chains=(1,),
    d_model=64,
    d_ff=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_context=256,
    kv_repeat="interleave",
)
#: Short enough that 70 tokens see frequencies kept, divided and between.
SCALING = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
CONFIGS = {
    "grouped": ONE_CHAIN,
    "one kv head a query head": replace(ONE_CHAIN, num_kv_heads=8),
    "one kv head": replace(ONE_CHAIN, num_kv_heads=1),
    "tied": replace(ONE_CHAIN, tie_embeddings=True),
    "llama3 rope": replace(ONE_CHAIN, rope_theta=500.0, rope_scaling=SCALING),
}
STORED_NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.layers.": "blocks.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "mlp.gate_proj": "ffn.w1",
    "mlp.down_proj": "ffn.w2",
    "mlp.up_proj": "ffn.w3",
}


def _make_llama(config: ColmConfig) -> Any:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_context,
        }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_context,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in llama.parameters():
            mean, std = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.2)
            parameter.normal_(mean, std)
    return llama.eval()


def _write_folder(folder: Path, config: ColmConfig, llama: Any) -> Path:
    tensors = {}
    for name, parameter in llama.named_parameters():  # a tied head is not among them
        stored = re.sub("|".join(map(re.escape, STORED_NAMES)), _stored_name, name)
        tensors[stored] = parameter.detach()
    folder.mkdir()
    config.save(folder)
    write_chain(folder, 1, tensors)
    return folder


def _stored_name(match: re.Match[str]) -> str:
    return STORED_NAMES[match.group()]


@torch.no_grad()
def _logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    model = load_model(folder).model
    x_TD = model.hidden_states(torch.tensor([tokens]))
    return model.logits(x_TD, [len(tokens)])


@torch.no_grad()
def _llama_logits(llama: Any, tokens: Sequence[int]) -> Tensor:
    logits: Tensor = llama(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_llama_s(config: ColmConfig, tmp_path: Path) -> None:
    llama = _make_llama(config)
    folder = _write_folder(tmp_path / "llama", config, llama)
    tokens = make_prompt(70, config)
    expected = _llama_logits(llama, tokens)
    assert expected.std() > 0.5, "logits too alike to compare"
    torch.testing.assert_close(_logits(folder, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_repeat": "tile"},
        {"rope_scaling": None},
        {"rope_theta": 10000.0},
        {"rms_norm_eps": 1e-1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_logits_are_not_llama_s_with_another_setting(wrong: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIGS["llama3 rope"]
    llama = _make_llama(config)
    folder = _write_folder(tmp_path / "llama", replace(config, **wrong), llama)
    tokens = make_prompt(70, config)
    assert (_logits(folder, tokens) - _llama_logits(llama, tokens)).abs().max() > 1e-2


def test_served_text_is_llama_s_greedy_text(tmp_path: Path) -> None:
    config = CONFIGS["llama3 rope"]
    llama = _make_llama(config)
    folder = _write_folder(tmp_path / "llama", config, llama)
    prompt = make_prompt(50, config)
    with torch.no_grad():
        whole = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
    expected = whole[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5, "text too constant to compare"

    pool = poisoned_pool(folder)
    table = pool.table(PAGES[0])
    prefill(open_chain_1(folder).model, pool, table, prompt[:-1], [8, 31])
    assert decode(whole_model(folder), pool, table, prompt, [1] * 24) == expected
    assert generate_alone(folder, prompt, [1] * 24) == expected
