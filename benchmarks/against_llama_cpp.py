"""Decode steps against llama.cpp on the same weights, at equal precision.

Needs `pip install -e '.[llama-cpp]'`, which builds llama.cpp for this machine. One chain, width
2048, 8 layers, random weights; llama.cpp gets them as GGUF files, and its scores are compared
with ours first, so both are known to compute the same model.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from decode import CACHED_TOKENS, DENSE, MAX_ROWS, Stepper, measure
from reporting import Row, save, show
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from colm_serve.model.chain_file import chain_path
from colm_serve.model.checkpoint import load_cpu_model, load_model, save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel

#: LLaMA reads kv heads in this order, and so does llama.cpp.
CONFIG = replace(DENSE, kv_repeat="interleave")
PRECISIONS = {
    "fp32": (torch.float32, gguf.GGMLQuantizationType.F32),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16),
    "8 bits": (torch.int8, gguf.GGMLQuantizationType.Q8_0),
}
NOTES = {
    "bf16": "llama.cpp multiplies in bfloat16, with activations rounded to it; ours in fp32",
    "8 bits": "ours has a scale an output, Q8_0 one for 32 inputs",
}
NAMES = {
    "attn.wq": "attn_q", "attn.wk": "attn_k", "attn.wv": "attn_v", "attn.wo": "attn_output",
    "ffn.w1": "ffn_gate", "ffn.w3": "ffn_up", "ffn.w2": "ffn_down",
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    config: ColmConfig, tensors: dict[str, Tensor], path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    """The chain as llama.cpp wants it: its names, and queries and keys in its rotary order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        if name.endswith(("wq.weight", "wk.weight")):
            tensor = _pair_neighbours(tensor, config.head_dim)
        values = tensor.float().numpy()
        is_matrix = values.ndim == 2
        stored = gguf.quants.quantize(values, kind) if is_matrix else values
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pair_neighbours(weight_OD: Tensor, head_dim: int) -> Tensor:
    """LLaMA's rotation pairs the halves of a head, llama.cpp's its neighbours."""
    halves: Tensor = weight_OD.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blocks":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return {"embedding": "token_embd", "norm": "output_norm", "head": "output"}[
        parts[0]
    ] + ".weight"


class Peer:
    """llama.cpp with `MAX_ROWS` sequences of `CACHED_TOKENS` tokens each."""

    def __init__(self, path: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = MAX_ROWS * (CACHED_TOKENS + 64)
        context.n_batch = context.n_ubatch = 512
        context.n_seq_max = MAX_ROWS
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        context.type_k = context.type_v = 0  # fp32 keys and values, as ours
        context.flash_attn_type = 0
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        for row in range(MAX_ROWS):
            self._decode([(1, i, row) for i in range(CACHED_TOKENS)])

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def step(self, num_rows: int) -> None:
        """The token after the cached ones, of this many rows; the cache is as before after it."""
        self._decode([(1, CACHED_TOKENS, row) for row in range(num_rows)])
        for row in range(num_rows):
            self.scores(row).argmax()
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, -1, CACHED_TOKENS, -1)

    def scores(self, row: int) -> np.ndarray:
        """[V] scores that the last step gave this row."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, shape=(CONFIG.vocab_size,))

    def _decode(self, tokens: list[tuple[int, int, int]]) -> None:
        self._batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            self._batch.token[i] = token
            self._batch.pos[i] = position
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = row
            self._batch.logits[i] = position == CACHED_TOKENS
        failed = llama_cpp.llama_decode(self._context, self._batch)
        assert not failed, f"llama.cpp gave {failed}"


def compare(name: str, folder: Path, scratch: Path, repeats: int) -> list[Row]:
    """Steps of one row and of several at one precision, in turns."""
    dtype, kind = PRECISIONS[name]
    path = scratch / "model.gguf"
    write_gguf(CONFIG, load_file(chain_path(folder, 1)), path, kind)
    ours = Stepper(CONFIG, load_cpu_model(folder, weight_dtype=dtype).model)
    theirs = Peer(path)
    ours.fill_cache()
    rows = []
    for num_rows in (1, MAX_ROWS):
        ratios = []
        for _ in range(repeats):
            their_s = min(measure(partial(theirs.step, num_rows), 3))
            our_s = min(measure(partial(ours.step, [1] * num_rows), 3))
            ratios.append(their_s / our_s)
        rows.append(
            Row.of(f"{name}, {num_rows} rows: tokens/s over llama.cpp's", ratios, "x", "higher",
                   target=1.0, headline=True, note=NOTES.get(name, ""))
        )  # fmt: skip
    theirs.close()
    return rows


@torch.inference_mode()
def check_same_model(folder: Path, scratch: Path) -> None:
    """Raise AssertionError unless both give the same scores to the same tokens in fp32."""
    path = scratch / "check.gguf"
    tensors = load_file(chain_path(folder, 1))
    write_gguf(CONFIG, tensors, path, gguf.GGMLQuantizationType.F32)
    theirs = Peer(path)
    theirs.step(1)
    model = load_model(folder).model
    x_TD = model.hidden_states(torch.ones(1, CACHED_TOKENS + 1, dtype=torch.long))
    expected = model.logits(x_TD[-1:], (1,))[0]
    actual = torch.from_numpy(theirs.scores(0).copy())
    theirs.close()
    path.unlink()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory, Console().status("timing decode steps"):
        scratch = Path(directory)
        folder = scratch / "model"
        save_model(ColmModel(CONFIG), folder)
        check_same_model(folder, scratch)
        for name in PRECISIONS:
            rows += compare(name, folder, scratch, repeats)
    show(f"Decode against llama.cpp {llama_cpp.__version__}, one chain of width 2048", rows)
    print(f"written to {save('against_llama_cpp', rows)}")


if __name__ == "__main__":
    main()
