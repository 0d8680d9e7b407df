"""The tensors of a LLaMA: Hugging Face's names, ours, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from colm_serve.model.config import ColmConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LlamaTensor:
    """One tensor: `name` in a Hugging Face checkpoint, `stored` in a chain's file."""

    name: str
    stored: str
    shape: tuple[int, ...]


def llama_tensors(config: ColmConfig) -> Iterator[LlamaTensor]:
    """All tensors of a one-chain model; a tied head is not among them."""
    vocab_size, d_model = config.vocab_size, config.d_model
    yield LlamaTensor(EMBEDDING, "embedding.weight", (vocab_size, d_model))
    for layer in range(config.num_layers):
        yield from _layer_tensors(config, layer)
    yield LlamaTensor("model.norm.weight", "norm.weight", (d_model,))
    if not config.tie_embeddings:
        yield LlamaTensor(HEAD, "head.weight", (vocab_size, d_model))


def _layer_tensors(config: ColmConfig, layer: int) -> Iterator[LlamaTensor]:
    d_model, d_ff = config.d_model, config.d_ff
    d_q, d_kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    for name, stored, shape in (
        ("input_layernorm", "attn_norm", (d_model,)),
        ("self_attn.q_proj", "attn.wq", (d_q, d_model)),
        ("self_attn.k_proj", "attn.wk", (d_kv, d_model)),
        ("self_attn.v_proj", "attn.wv", (d_kv, d_model)),
        ("self_attn.o_proj", "attn.wo", (d_model, d_q)),
        ("post_attention_layernorm", "ffn_norm", (d_model,)),
        ("mlp.gate_proj", "ffn.w1", (d_ff, d_model)),
        ("mlp.down_proj", "ffn.w2", (d_model, d_ff)),
        ("mlp.up_proj", "ffn.w3", (d_ff, d_model)),
    ):
        yield LlamaTensor(
            f"model.layers.{layer}.{name}.weight", f"blocks.{layer}.{stored}.weight", shape
        )
