"""The plain values that travel between the rooms. No torch, grpc or ray here.

Protobuf objects become these at `transport.serde` and go no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from colm_serve.errors import InvalidArgument

MAX_SEED = 2**64 - 1


class FinishReason(Enum):
    """Why a generation ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; draws are keyed by (seed, position).

    Raises:
        InvalidArgument: a value outside what is allowed.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 <= self.temperature <= 2:
            raise InvalidArgument("temperature", self.temperature, "0 to 2")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("top_p", self.top_p, "above 0, at most 1")
        if self.top_k < 0:
            raise InvalidArgument("top_k", self.top_k, "0 (off) or more")
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", self.max_tokens, "1 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidArgument("seed", self.seed, f"0 to {MAX_SEED}")


@dataclass(frozen=True)
class KvLayout:
    """The sizes of a KV cache entry; workers exchange KV only when these agree."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def num_elements_per_token(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class StageTimings:
    """Where a request's time went, in seconds."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    first_step_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True)
class DecodeRequest:
    """What a router asks of a decode worker."""

    request_id: str
    prompt: tuple[int, ...]
    level: int
    sampling: SamplingParams
    prefill_addresses: tuple[str, ...]
    kv_identity: str


@dataclass(frozen=True)
class MoveLevel:
    """Make the tokens of a running request at another level from its next step on."""

    level: int


@dataclass(frozen=True)
class PrefillRequest:
    """What a decode worker asks of a prefill worker: KV of tokens [ship_from, len(tokens))."""

    request_id: str
    tokens: tuple[int, ...]
    ship_from: int
    kv_identity: str
    layout: KvLayout


@dataclass(frozen=True)
class Admitted:
    """The decode worker has reserved pages for a request."""

    num_cached_tokens: int


@dataclass(frozen=True)
class DecodedToken:
    """One token and the level that made it."""

    token_id: int
    level: int


@dataclass(frozen=True)
class Decoded:
    """A request's end at its decode worker."""

    reason: FinishReason
    num_cached_tokens: int
    num_shipped_tokens: int
    timings: StageTimings


DecodeEvent = Admitted | DecodedToken | Decoded


@dataclass(frozen=True)
class StepCost:
    """A decode worker's measured step time.

    A step takes the sum over chains i of `chain_s[i]` (when any row uses the chain: its weights
    are read once) plus `row_s[i]` for each row beyond the first.
    """

    chain_s: tuple[float, ...]
    row_s: tuple[float, ...]

    def step_s(self, rows_per_chain: Sequence[int]) -> float:
        """Predicted seconds of a step in which chain i serves `rows_per_chain[i]` rows."""
        return sum(
            chain + row * (rows - 1)
            for chain, row, rows in zip(self.chain_s, self.row_s, rows_per_chain, strict=False)
            if rows > 0
        )


@dataclass(frozen=True)
class DecodeStatus:
    """A decode worker's load; `num_running[k - 1]` counts the rows at level k."""

    worker_id: str
    epoch: int
    kv_identity: str
    num_levels: int
    max_rows: int
    num_waiting: int
    num_running: tuple[int, ...]
    num_free_pages: int
    num_pages: int
    page_size: int
    step_cost: StepCost
    prefill_tokens_per_s: float


@dataclass(frozen=True)
class PrefillStatus:
    """A prefill worker's load."""

    worker_id: str
    epoch: int
    kv_identity: str
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    tokens_per_s: float
    num_free_pages: int
    num_pages: int


class WorkerKind(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Member:
    """A live worker. The epoch is new for every process, so a restart is never mistaken."""

    kind: WorkerKind
    worker_id: str
    address: str
    epoch: int
    kv_identity: str


@dataclass(frozen=True)
class Membership:
    """Who is in the cluster, as the controller last knew; a higher version replaces a lower."""

    version: int = 0
    members: tuple[Member, ...] = field(default_factory=tuple)

    def of_kind(self, kind: WorkerKind) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.kind is kind)
