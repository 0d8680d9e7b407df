"""lm-evaluation-harness against a served model, at each chain level (see docs/evaluation.md).

The harness scores text that the bundled model was not trained on, through `/v1/completions`. The
same text is scored by the model in one process too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval_tasks.stdlib_documents import load
from reporting import Row, save, show
from rich.console import Console

from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from colm_serve.model.checkpoint import load_model
from colm_serve.model.transformer import ColmModel
from colm_serve.router.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "stdlib-air"
TASK = "stdlib"


def harness(base_url: str, level: int, limit: int) -> float:
    """Bits per byte of the task's first documents, as the harness finds them."""
    model_args = {
        "model": f"{MODEL.name}:level-{level}",
        "base_url": f"{base_url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(MODEL),
        "max_length": 4096,
        "num_concurrent": 4,
    }
    with TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(f"{key}={value}" for key, value in model_args.items()),
            "--include_path", str(ROOT / "benchmarks" / "lm_eval_tasks"), "--tasks", TASK,
            "--limit", str(limit), "--output_path", folder,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        subprocess.run(command, env={**os.environ, **offline}, check=True, capture_output=True)
        (path,) = Path(folder).rglob("results_*.json")
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))["results"][TASK]
    return float(results["bits_per_byte,none"])


@torch.inference_mode()
def one_process(model: ColmModel, tokenizer: Tokenizer, level: int, limit: int) -> float:
    """The same figure, without a server."""
    num_bits, num_bytes = 0.0, 0
    for text in load()["test"][:limit]["text"]:
        # The harness puts the end of a text before one where there is no BOS.
        token_ids = [model.config.eos_token_ids[0], *tokenizer.encode(text)]
        x_TD = model.hidden_states(torch.tensor([token_ids]), [level])
        logprobs_TV = model.logits(x_TD, [len(token_ids)] * level).log_softmax(dim=-1)
        chosen_T = logprobs_TV[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])
        num_bits -= chosen_T.double().sum().item() / math.log(2)
        num_bytes += len(text.encode())
    return num_bits / num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=45, help="documents of the task")
    limit = parser.parse_args().limit
    model, tokenizer = load_model(MODEL).model, Tokenizer.load(MODEL)
    assert tokenizer is not None
    levels = range(1, model.num_chains + 1)
    with Console().status("scoring held-out text"):
        expected = [one_process(model, tokenizer, level, limit) for level in levels]
        config = ClusterConfig.load(ROOT / "cluster_configs" / "demo.yaml")
        with Cluster(config) as cluster:
            base_url = f"http://{cluster.addresses.http}/v1"
            found = [harness(base_url, level, limit) for level in levels]
    rows = [Row.of("held-out text at level 1", found[:1], "bits/byte", "lower")]
    rows += [
        Row.of(
            f"held-out text at level {level}",
            [bits],
            "bits/byte",
            "lower",
            target=below,
            headline=level == 4,
        )
        for level, (below, bits) in enumerate(pairwise(found), start=2)
    ]
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    rows.append(
        Row.of("served against one process, any level", [max(apart)], "bits/byte", "lower",
               target=1e-4)
    )  # fmt: skip
    show(f"lm-evaluation-harness, {limit} held-out files, by level", rows)
    print(f"written to {save('evaluation_harness', rows)}")


if __name__ == "__main__":
    main()
