"""Tiny models, workers and reference generation that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from colm_serve.config import DecodeConfig, PrefillConfig
from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.decode_worker.service import DecodeService
from colm_serve.decode_worker.speculation import Step
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine.loading import load_for_serving
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run, Sampled, sample
from colm_serve.model.checkpoint import load_model, save_model
from colm_serve.model.config import ColmConfig
from colm_serve.model.cpu_model import CpuModel
from colm_serve.model.serving import ServingModel
from colm_serve.model.transformer import ColmModel
from colm_serve.prefill_worker.service import PrefillService
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.transport.host import ServiceThread

# Tiny models gain nothing from threads, and on busy cores threads that wait for each other crawl.
torch.set_num_threads(1)

TINY = ColmConfig(
    vocab_size=97,
    chains=(2, 2, 4),
    d_model=64,
    d_ff=128,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    max_context=2048,
)
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def make_model_folder(folder: Path, config: ColmConfig = TINY, seed: int = 0) -> Path:
    """A model with random weights, large enough that its text is not constant."""
    torch.manual_seed(seed)
    model = ColmModel(config)
    with torch.no_grad():
        for weight in model.embedding.weights:
            weight.normal_(std=1.0)
        for weight in model.head.weights if model.head is not None else ():
            weight.normal_(std=1.0)
    save_model(model, folder)
    return folder


def make_prompt(num_tokens: int, config: ColmConfig = TINY, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(config.vocab_size, (num_tokens,), generator=generator).tolist())


@cache
def whole_model(folder: Path) -> ColmModel:
    """Every chain of a model folder; do not change it."""
    return load_model(folder).model


def before_each_block(model: ServingModel, call: Callable[[], object]) -> None:
    """Call `call` before layers run, one or several: to count, slow down or hold."""
    assert isinstance(model, CpuModel)

    def hold(run: Callable[..., None], *arguments: Any) -> None:
        call()
        run(*arguments)

    model.run_layers = partial(hold, model.run_layers)  # type: ignore[method-assign]
    model.finish_layer = partial(hold, model.finish_layer)  # type: ignore[method-assign]


def before_each_step(worker: DecodeWorker, call: Callable[[], object]) -> None:
    """Call `call` before each pass that makes tokens; prompts are computed without."""
    run_rows = worker._run_rows

    def hold(steps: list[Step], *arguments: Any) -> Any:
        if steps:
            call()
        return run_rows(steps, *arguments)

    worker._run_rows = hold  # type: ignore[assignment, method-assign]


@torch.inference_mode()
def generate_alone(
    folder: Path,
    prompt: tuple[int, ...],
    levels: Sequence[int],
    sampling: SamplingParams = GREEDY,
    draft_level: int | None = None,
) -> list[int]:
    """Tokens of the whole model in one process, without pages or cache: token i at levels[i].

    Those at levels above `draft_level` are drawn as speculation with that drafter draws them.
    """
    model = whole_model(folder)
    tokens = list(prompt)
    request = DecodeRequest("alone", prompt, levels[0], sampling, (), "")
    processor = LogitsProcessor.make(request, tokens, model.config.eos_token_ids)
    for level in levels:
        drafter_logits = None
        if draft_level is not None and level > draft_level:
            drafter_logits = next_logits(model, tokens, draft_level)
        run = Run(sampling, len(tokens), processor, drafter_logits_SV=drafter_logits)
        tokens += sample_rows(next_logits(model, tokens, level), run)
    return tokens[len(prompt) :]


def sample_rows(logits_BV: torch.Tensor, *runs: Run) -> list[int]:
    """The token of each row, none of which has drafts."""
    return [token for sampled in sample_all(logits_BV, runs) for token in sampled.tokens]


def sample_all(logits_SV: torch.Tensor, runs: Sequence[Run]) -> list[Sampled]:
    """As `sample`, where none fails."""
    made = sample(logits_SV, runs)
    done = [sampled for sampled in made if isinstance(sampled, Sampled)]
    assert len(done) == len(made), made
    return done


@torch.inference_mode()
def next_logits(model: ColmModel, tokens: Sequence[int], level: int) -> torch.Tensor:
    """[1, V] scores of the token after `tokens`, from a forward over all of them."""
    x_TD = model.hidden_states(torch.tensor([tokens]), [level])[-1:]
    return model.logits(x_TD, [1] * level)


@contextmanager
def prefill_service(
    folder: Path,
    epoch: int = 1,
    *,
    before_block: Callable[[], object] | None = None,
    **changes: object,
) -> Iterator[tuple[PrefillService, PrefillWorker]]:
    """A real prefill worker on a free port, in this process."""
    config = PrefillConfig.model_validate({"kv_tokens": 4096, "chunk_tokens": 128, **changes})
    loaded = load_for_serving(folder, num_chains=1, with_head=False)
    worker = PrefillWorker(loaded, config, f"prefill-{epoch}", epoch)
    if before_block is not None:
        before_each_block(loaded.model, before_block)
    service = PrefillService(worker, config)
    host = ServiceThread(service)
    try:
        yield service, worker
    finally:
        host.stop()
        worker.check_integrity()
        status = worker.status()
        assert status.num_free_pages == status.num_pages, "pages were not given back"


@contextmanager
def decode_service(
    folder: Path,
    epoch: int = 1,
    *,
    before_block: Callable[[], object] | None = None,
    before_step: Callable[[], object] | None = None,
    grace_s: float = 2.0,
    variant: str | None = "",
    **changes: object,
) -> Iterator[tuple[DecodeService, DecodeWorker]]:
    """A real decode worker on a free port, in this process."""
    # Whether drafts pay is measured, and tests count steps; likewise where a prompt is computed.
    base = {
        "kv_tokens": 8192,
        "local_prefill_tokens": 0,
        "adaptive_prefill": False,
        "speculation": {"enabled": False},
    }
    config = DecodeConfig.model_validate({**base, **changes})
    loaded = load_for_serving(folder, num_chains=None, with_head=True)
    worker = DecodeWorker(loaded, config, f"decode-{epoch}", epoch, variant)
    if before_block is not None:
        before_each_block(loaded.model, before_block)
    if before_step is not None:
        before_each_step(worker, before_step)
    service = DecodeService(worker, config)
    host = ServiceThread(service)
    try:
        yield service, worker
    finally:
        host.stop(grace_s)
        worker.check_integrity()
        status = worker.status()
        assert status.num_free_pages == status.num_pages, "pages were not given back"


def with_tokens(sampling: SamplingParams, max_tokens: int) -> SamplingParams:
    return replace(sampling, max_tokens=max_tokens)


def p_value(outcomes: Sequence[int], p_V: torch.Tensor) -> float:
    """Pearson's chi-square test that the outcomes were drawn from `p_V`; 0 if any cannot be.

    Outcomes expected fewer than 5 times count as one.
    """
    counts = torch.bincount(torch.tensor(outcomes), minlength=len(p_V)).double()
    expected = p_V.double() * len(outcomes)
    if counts[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, chi_square / 2))
