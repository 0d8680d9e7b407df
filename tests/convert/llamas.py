"""Generated LLaMA folders of every variant, written by transformers itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|eot|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Short enough that 70 tokens see frequencies kept, divided and between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 8},
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [1, 2]},
    "wide heads": {"head_dim": 24},
    "bf16 shards": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "dtype": "bfloat16"},
}
_SHARD_SIZES = {"bf16 shards": "60KB"}


def write_llama(folder: Path, variant: str) -> Path:
    """A folder of the variant with random weights, tokenizer and chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **VARIANTS[variant]})
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            mean, std = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.2)
            parameter.normal_(mean, std)
    llama.to(config.dtype or torch.float32)
    llama.save_pretrained(folder, max_shard_size=_SHARD_SIZES.get(variant, "5GB"))
    _tokenizer().save_pretrained(folder)
    return folder


def open_llama(folder: Path) -> Any:
    """The folder as transformers sees it, in fp32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files, under their stored names."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the models' vocabulary size, with BOS before every prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text("utf-8").splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
