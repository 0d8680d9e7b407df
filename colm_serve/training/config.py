"""A training recipe: one YAML file, read once, frozen, every key checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml

from colm_serve.errors import InvalidConfig
from colm_serve.files import write_atomically
from colm_serve.model.config import ColmConfig
from colm_serve.training.stream_config import StreamConfig
from colm_serve.training.tuning import Tuning
from colm_serve.yaml_text import parse_yaml

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, apart from the corpus itself.

    Attributes:
        model: the model to train; its vocab_size is also the tokenizer's. May be left out of a
            recipe with `tuning`, whose base has it.
        num_steps: optimizer steps; the learning rate's decay ends with the last.
        tuning: the model to begin from and what of it stays; None: random weights.
        backbone_steps: of which this many train on the top level's loss alone, and the rest train
            the heads of all levels on the frozen backbone, with a warm-up and decay of their own
            (3.4's two stages); None: all steps train everything on all levels.
        seed: of the initial weights, the order of the data and the drawn levels.
        seq_len: tokens a training sequence.
        sequences_per_step: sequences behind one optimizer step.
        sequences_per_micro_batch: of which this many are in memory at once.
        lower_levels: levels below the top one in each micro-batch's loss, drawn anew each time
            and weighted so that the expectation is the mean over all levels; None: all.
        peak_lr: AdamW's learning rate after `warmup_steps` of linear warm-up; it then falls
            along a cosine to `final_lr_fraction` of itself.
        weight_decay: on matrices, not on norms.
        grad_clip: largest norm of a step's gradient.
        precision: of matrix products; weights, gradients and reductions stay fp32.
        recompute_activations: keep only the blocks' inputs for the backward pass and run each
            block again there: less memory for a third more work.
        stream: a Hugging Face dataset to read as training goes on; None: a folder of files.
        heldout_fraction: share of the corpus' documents that training never sees.
        exclude: shell patterns of a folder's files to leave out.
        text_field: where the rows of a JSONL or parquet file, or of a stream, hold their text.
        eval_interval_steps: steps between looks at the held-out loss.
        eval_tokens: held-out tokens in one such look; of a stream, all there are.
        log_interval_steps: steps between lines of `metrics.jsonl`.
        checkpoint_interval_s: seconds between checkpoints.

    Raises:
        InvalidConfig: a value that is not allowed, named with what is.
    """

    model: ColmConfig
    num_steps: int
    seed: int
    seq_len: int
    sequences_per_step: int
    sequences_per_micro_batch: int
    peak_lr: float
    warmup_steps: int
    tuning: Tuning | None = None
    backbone_steps: int | None = None
    lower_levels: int | None = None
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    precision: Precision = "bf16"
    recompute_activations: bool = False
    stream: StreamConfig | None = None
    heldout_fraction: float = 0.03
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    eval_interval_steps: int = 100
    eval_tokens: int = 65536
    log_interval_steps: int = 1
    checkpoint_interval_s: float = 180.0

    def __post_init__(self) -> None:
        self._check_types()
        for key in (
            "num_steps", "seq_len", "sequences_per_step", "sequences_per_micro_batch",
            "peak_lr", "grad_clip", "eval_interval_steps", "eval_tokens", "log_interval_steps",
            "checkpoint_interval_s",
        ):  # fmt: skip
            self._check(key, getattr(self, key) > 0, "a positive number")
        for key in ("seed", "weight_decay"):
            self._check(key, getattr(self, key) >= 0, "zero or a positive number")
        self._check("text_field", bool(self.text_field), "a key or column's name")
        self._check("precision", self.precision in get_args(Precision), "fp32 or bf16")
        self._check("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "0 to 1")
        self._check("heldout_fraction", 0 < self.heldout_fraction < 1, "between 0 and 1")
        no_files = self.stream is None or not self.exclude
        self._check("exclude", no_files, "empty where a stream has data_files to choose by")
        self._check_stages()
        self._check(
            "seq_len",
            self.seq_len <= self.model.max_context,
            f"1 to the model's max_context, {self.model.max_context}",
        )
        self._check(
            "sequences_per_step",
            self.sequences_per_step % self.sequences_per_micro_batch == 0,
            f"a multiple of sequences_per_micro_batch, {self.sequences_per_micro_batch}",
        )
        num_lower = self.model.num_chains - 1
        if self.tuning is not None:
            self.tuning.check(self.model)
            num_lower -= self.tuning.frozen_chains
        self._check(
            "lower_levels",
            self.lower_levels is None or 0 <= self.lower_levels <= num_lower,
            f"0 to {num_lower}, or null for all",
        )

    def _check_stages(self) -> None:
        shortest = self.num_steps
        if self.backbone_steps is not None:
            last = self.num_steps - 1
            self._check("backbone_steps", 1 <= self.backbone_steps <= last, f"1 to {last}, or null")
            self._check(
                "backbone_steps",
                not self.model.tie_embeddings,
                "null, as the head of a model with tie_embeddings is part of its backbone",
            )
            self._check(
                "backbone_steps",
                self.tuning is None or self.tuning.lora_rank is None,
                "null with tuning.lora_rank, which trains what the heads' stage would freeze",
            )
            shortest = min(self.backbone_steps, self.num_steps - self.backbone_steps)
        self._check("warmup_steps", 0 <= self.warmup_steps <= shortest, f"0 to {shortest}")

    def _check(self, key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidConfig(key, getattr(self, key), allowed)

    def _check_types(self) -> None:
        numbers: dict[object, tuple[type, ...]] = {int: (int,), float: (int, float)}
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            if hint is bool:
                self._check(key, isinstance(value, bool), "true or false")
            if hint is str:
                self._check(key, isinstance(value, str), "a text")
            if hint in numbers:
                is_number = isinstance(value, numbers[hint]) and not isinstance(value, bool)
                self._check(key, is_number, f"a number of type {hint.__name__}")

    @property
    def num_micro_batches(self) -> int:
        return self.sequences_per_step // self.sequences_per_micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        tuning = self.tuning and self.tuning.to_dict()
        values = {**asdict(self), "model": self.model.to_dict(), "tuning": tuning}
        return cast(dict[str, Any], json.loads(json.dumps(values)))

    def save(self, path: Path) -> None:
        """Write a YAML file that `load` reads back."""
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrainConfig:
        """Build from a recipe's content; unknown and missing keys fail."""
        known = {field.name for field in fields(cls)}
        for key in raw:
            if key not in known:
                raise InvalidConfig(key, raw[key], f"only the keys {sorted(known)}")
        values = dict(raw)
        if values.get("tuning") is not None:
            values["tuning"] = Tuning.from_dict(values["tuning"])
        if values.get("stream") is not None:
            values["stream"] = StreamConfig.from_dict(values["stream"])
        values["model"] = _read_model(raw.get("model"), values.get("tuning"))
        if "exclude" in values:
            values["exclude"] = tuple(values["exclude"] or ())
        try:
            return cls(**values)
        except TypeError as error:
            raise InvalidConfig("train config", sorted(raw), str(error)) from error

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a YAML file; a relative `tuning.base`, and a stream's local folder, count from its
        folder.

        Raises:
            InvalidConfig: not there, not YAML, an unknown key or a value that is not allowed.
        """
        try:
            raw = parse_yaml(path.read_text("utf-8"))
        except OSError as error:
            raise InvalidConfig("config", str(path), f"a readable file ({error})") from error
        except yaml.YAMLError as error:
            raise InvalidConfig("config", str(path), f"YAML ({error})") from error
        if not isinstance(raw, dict):
            raise InvalidConfig("config", str(path), "a mapping of keys to values")
        tuning = raw.get("tuning")
        if isinstance(tuning, dict) and isinstance(tuning.get("base"), str):
            base = str((path.parent / tuning["base"]).resolve())
            raw = {**raw, "tuning": {**tuning, "base": base}}
        if isinstance(raw.get("stream"), dict):
            raw = {**raw, "stream": StreamConfig.counted_from(path.parent, raw["stream"])}
        return cls.from_dict(raw)


def _read_model(raw: Any, tuning: Tuning | None) -> ColmConfig:
    if raw is None and tuning is not None:
        return ColmConfig.load(tuning.base)
    if not isinstance(raw, dict):
        raise InvalidConfig("model", raw, "a mapping of the model's keys")
    return ColmConfig.from_dict({"model_type": "colm", **raw})
