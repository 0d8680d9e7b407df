"""One-chain prefill against transformers' LLaMA with sdpa, on the same weights.

Both read a prompt and score the token after it. Layers have the shape of LLaMA-3.2-1B; there are
four, with random weights and a vocabulary of 512, so that nearly all work is the layers'.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from prefill_throughput import DENSE, PAGE_SIZE
from reporting import Row, save, show
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from colm_serve.config import PrefillConfig
from colm_serve.engine.loading import load_for_serving, make_pool
from colm_serve.engine.prefill import PrefillChunk, run_prefill
from colm_serve.engine.step import Segment, run_pass
from colm_serve.model.chain_file import chain_path
from colm_serve.model.checkpoint import save_model
from colm_serve.model.transformer import ColmModel

LENGTHS = (512, 1024, 2048, 4096)
CONFIG = replace(DENSE, vocab_size=512, kv_repeat="interleave")
THEIR_NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "head.": "lm_head.",
}


class Ours:
    """A folder's model and a pool for the longest prompt."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        loaded = load_for_serving(folder, num_chains=1, with_head=True)
        self._model = loaded.model
        self._pool = make_pool(loaded, -(-max_tokens // PAGE_SIZE), PAGE_SIZE)
        self._table = self._pool.table(range(self._pool.num_pages))
        self._chunk_tokens = PrefillConfig().chunk_tokens

    def scores(self, tokens: list[int]) -> Tensor:
        """Of the next token, [V]: the prompt in chunks, its last token in a pass of its own."""
        last = len(tokens) - 1
        for start in range(0, last, self._chunk_tokens):
            chunk = tokens[start : min(start + self._chunk_tokens, last)]
            run_prefill(self._model, self._pool, [PrefillChunk(chunk, start, self._table)])
        segment = Segment(tokens[last:], last, 1, self._table)
        return run_pass(self._model, self._pool, [segment]).logits_SV[0]


def load_theirs(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.d_model,
            intermediate_size=CONFIG.d_ff, num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads, num_key_value_heads=CONFIG.num_kv_heads,
            max_position_embeddings=CONFIG.max_context, rms_norm_eps=CONFIG.rms_norm_eps,
            rope_theta=CONFIG.rope_theta, attn_implementation="sdpa",
        )
    )  # fmt: skip
    model.load_state_dict(
        {_their_name(name): tensor for name, tensor in load_file(chain_path(folder, 1)).items()}
    )
    return model.eval()


def _their_name(name: str) -> str:
    name = name if name.startswith("blocks.") else name.replace("norm.", "model.norm.")
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def compare(ours: Ours, theirs: LlamaForCausalLM, num_tokens: int, repeats: int) -> list[Row]:
    """Both in turn; the ratio is taken pair by pair. Raises where their scores differ."""
    tokens = [i * 7 % CONFIG.vocab_size for i in range(num_tokens)]
    ids = torch.tensor([tokens])

    def their_scores() -> Tensor:
        with torch.inference_mode():
            scores: Tensor = theirs(ids, use_cache=True, logits_to_keep=1).logits[0, -1]
        return scores

    torch.testing.assert_close(ours.scores(tokens), their_scores(), rtol=1e-3, atol=1e-3)
    pairs = [
        (_seconds(lambda: ours.scores(tokens)), _seconds(their_scores)) for _ in range(repeats)
    ]
    case = f"one chain, {num_tokens} tokens"
    return [
        Row.of(f"{case}: ours", [a * 1e3 for a, _ in pairs], "ms", "lower"),
        Row.of(f"{case}: transformers", [b * 1e3 for _, b in pairs], "ms", "lower"),
        Row.of(f"{case}: tokens/s over transformers'", [b / a for a, b in pairs], "x", "higher",
               target=1.1, headline=True),
    ]  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(ColmModel(CONFIG), folder)
        ours, theirs = Ours(folder, max(arguments.lengths)), load_theirs(folder)
    rows: list[Row] = []
    with Console().status("timing prefill"):
        for num_tokens in arguments.lengths:
            rows += compare(ours, theirs, num_tokens, arguments.repeats)
    show("One-chain prefill and transformers' LLaMA, fp32, the same weights", rows)
    print(f"written to {save('prefill_against_transformers', rows)}")


if __name__ == "__main__":
    main()
