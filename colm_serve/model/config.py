"""What a CoLM is made of: sizes, chains, key/value sharing, rotary embedding, heads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from colm_serve.errors import CheckpointError, InvalidConfig
from colm_serve.json_file import JsonObject, read_json, write_json
from colm_serve.model.rope_scaling import Llama3RopeScaling, is_positive_number

CONFIG_FILE = "config.json"

KvSharing = Literal["air", "per_chain"]
KvRepeat = Literal["tile", "interleave"]
Head = Literal["shared", "per_level"]
FeedForward = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class ColmConfig:
    """A Chain-of-Language-Model's configuration (paper 3 and Table 9).

    Attributes:
        vocab_size: number of token ids.
        chains: base ratio of each chain (the paper's C); a width W gives chain i
            W * chains[i] / sum(chains) columns.
        d_model: width of a hidden state over all chains.
        d_ff: width of the feed-forward's hidden layer over all chains.
        num_layers: transformer blocks.
        num_heads: query heads over all chains.
        num_kv_heads: key/value heads; all in chain 1 under "air", divided among the chains
            under "per_chain".
        head_dim: width of one head.
        max_context: longest sequence in tokens, prompt and output together.
        kv_sharing: "air" computes K and V from chain 1 alone (3.3, Algorithm 3), "per_chain"
            gives each chain its own (3.2.1, Algorithm 2).
        kv_repeat: which kv head query head h of a chain reads: "tile" h % n_kv (Algorithm 3),
            "interleave" h // n_rep (FlashAttention and LLaMA).
        head: "shared" scores level k with the first columns of one matrix (3.4), "per_level"
            has a matrix of its own for each level.
        ffn: "swiglu" (Algorithm 5) or "gelu" (Algorithm 4).
        rope_theta: base of the rotary embedding.
        rope_scaling: LLaMA 3's rescaling, or None.
        rms_norm_eps: added to the mean square in each norm.
        tie_embeddings: the shared head is the embedding matrix.
        bos_token_id: put before a prompt, or None.
        eos_token_ids: any of these ends a generation.

    Raises:
        InvalidConfig: a value that is not allowed, named with what is.
    """

    vocab_size: int
    chains: tuple[int, ...]
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    kv_sharing: KvSharing = "air"
    kv_repeat: KvRepeat = "tile"
    head: Head = "shared"
    ffn: FeedForward = "swiglu"
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.chains or not all(map(_is_positive_int, self.chains)):
            raise InvalidConfig("chains", list(self.chains), "one or more positive integers")
        for key in (
            "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "max_context",
        ):  # fmt: skip
            if not _is_positive_int(getattr(self, key)):
                raise InvalidConfig(key, getattr(self, key), "a positive integer")
        for key, allowed in (
            ("kv_sharing", KvSharing), ("kv_repeat", KvRepeat), ("head", Head),
            ("ffn", FeedForward),
        ):  # fmt: skip
            if getattr(self, key) not in get_args(allowed):
                raise InvalidConfig(key, getattr(self, key), " or ".join(get_args(allowed)))
        for key in ("rope_theta", "rms_norm_eps"):
            if not is_positive_number(getattr(self, key)):
                raise InvalidConfig(key, getattr(self, key), "a positive number")
        self._check_token_ids()
        if self.head_dim % 2:
            raise InvalidConfig("head_dim", self.head_dim, "an even number (rotary embedding)")
        if self.tie_embeddings and self.head == "per_level":
            raise InvalidConfig("tie_embeddings", True, "false when head is per_level")
        self._check_chains_divide()

    def _check_token_ids(self) -> None:
        ids = {"bos_token_id": self.bos_token_id, "eos_token_ids": list(self.eos_token_ids)}
        for key, value in ids.items():
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < self.vocab_size for i in listed):
                raise InvalidConfig(key, value, f"of token ids, 0 to {self.vocab_size - 1}")

    def _check_chains_divide(self) -> None:
        total = sum(self.chains)
        split = ["d_model", "d_ff", "num_heads"]
        if self.kv_sharing == "per_chain":
            split.append("num_kv_heads")
        for key in split:
            width = getattr(self, key)
            if any(width * c % total for c in self.chains):
                raise InvalidConfig(
                    key, width, f"a width that chains {list(self.chains)} divide evenly"
                )
        kv_per_chain = self._kv_heads_read_by_chain()
        for heads, kv in zip(self.heads_per_chain, kv_per_chain, strict=True):
            if heads % kv:
                raise InvalidConfig(
                    "num_kv_heads",
                    self.num_kv_heads,
                    f"a count that divides every chain's query heads {self.heads_per_chain}",
                )

    def _kv_heads_read_by_chain(self) -> tuple[int, ...]:
        if self.kv_sharing == "air":
            return (self.num_kv_heads,) * self.num_chains
        return self._split(self.num_kv_heads)

    def _split(self, width: int) -> tuple[int, ...]:
        return tuple(width * c // sum(self.chains) for c in self.chains)

    @property
    def num_chains(self) -> int:
        return len(self.chains)

    @cached_property
    def chain_dims(self) -> tuple[int, ...]:
        """Columns of a hidden state that each chain owns."""
        return self._split(self.d_model)

    @cached_property
    def chain_ff_dims(self) -> tuple[int, ...]:
        return self._split(self.d_ff)

    @cached_property
    def heads_per_chain(self) -> tuple[int, ...]:
        return self._split(self.num_heads)

    @cached_property
    def kv_heads_per_chain(self) -> tuple[int, ...]:
        """Key/value heads that each chain computes: (all,) under "air"."""
        if self.kv_sharing == "air":
            return (self.num_kv_heads,)
        return self._split(self.num_kv_heads)

    @cached_property
    def level_dims(self) -> tuple[int, ...]:
        """Width of a hidden state at each level."""
        return tuple(accumulate(self.chain_dims))

    def check_level(self, level: int, field: str = "level") -> None:
        """Raise InvalidConfig unless 1 <= level <= number of chains."""
        if not 1 <= level <= self.num_chains:
            raise InvalidConfig(field, level, f"1 to {self.num_chains}")

    def num_params(self, level: int | None = None) -> int:
        """Parameters that are active at `level` (default: the highest)."""
        level = self.num_chains if level is None else level
        self.check_level(level)
        total = 0
        for i in range(level):
            d_i, ff_i = self.chain_dims[i], self.chain_ff_dims[i]
            d_in = self.level_dims[i]
            q_i = self.heads_per_chain[i] * self.head_dim
            heads_in = sum(self.heads_per_chain[: i + 1]) * self.head_dim
            ff_in = sum(self.chain_ff_dims[: i + 1])
            kv_i = self.kv_heads_per_chain[i] if i < len(self.kv_heads_per_chain) else 0
            num_up = 2 if self.ffn == "swiglu" else 1
            block = q_i * d_in + 2 * kv_i * self.head_dim * d_in + d_i * heads_in
            block += num_up * ff_i * d_in + d_i * ff_in + 2 * d_i
            total += self.num_layers * block + d_i + self.vocab_size * d_i
            if self.head == "shared" and not self.tie_embeddings:
                total += self.vocab_size * d_i
        if self.head == "per_level":
            total += self.vocab_size * self.level_dims[level - 1]
        return total

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "colm", **asdict(self)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ColmConfig:
        """Build from `config.json`'s content; unknown keys and a foreign model_type fail."""
        values = dict(raw)
        if values.pop("model_type", None) != "colm":
            raise InvalidConfig("model_type", raw.get("model_type"), "colm")
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidConfig(key, values[key], f"only the keys {sorted(known)}")
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = Llama3RopeScaling.from_dict(values["rope_scaling"])
        for key in ("chains", "eos_token_ids"):
            if key in values and not isinstance(values[key], (list, tuple)):
                raise InvalidConfig(key, values[key], "a list of integers")
            if key in values:
                values[key] = tuple(values[key])
        try:
            return cls(**values)
        except TypeError as error:
            raise InvalidConfig("config.json", sorted(values), str(error)) from error

    @classmethod
    def load(cls, folder: Path) -> ColmConfig:
        """Read `folder/config.json`; raises CheckpointError where it cannot be."""
        return cls.from_json(read_json(folder / CONFIG_FILE))

    @classmethod
    def from_json(cls, raw: JsonObject) -> ColmConfig:
        """The same of the file's content; raises CheckpointError, which names the file."""
        try:
            return cls.from_dict(raw.values)
        except InvalidConfig as error:
            raise CheckpointError(f"{raw.path}: {error}") from error

    def save(self, folder: Path) -> None:
        write_json(folder / CONFIG_FILE, self.to_dict())


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value >= 1
