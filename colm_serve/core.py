"""The plain values that travel between the rooms. No torch, grpc or ray here.

Protobuf objects become these at `transport.serde` and go no further.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100
MAX_LOGIT_BIAS_TOKENS = 300
MAX_STOP_TOKEN_IDS = 64


class FinishReason(Enum):
    """Why a generation ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; draws are keyed by (seed, position).

    `logit_bias` pairs token ids with what is added to their scores; `logprobs` is the number of
    likeliest tokens to report with each chosen one, None for no logprobs at all, and
    `prompt_logprobs` the same for the tokens of the prompt. The end of a `grammar` is the end of
    the text, whatever `ignore_eos` and `min_tokens` say.

    Raises:
        InvalidArgument: a value outside what is allowed.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("top_p", self.top_p, "above 0, at most 1")
        if not 0 < self.repetition_penalty <= 2:
            raise InvalidArgument("repetition_penalty", self.repetition_penalty, "above 0, to 2")
        if self.top_k < 0:
            raise InvalidArgument("top_k", self.top_k, "0 (off) or more")
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", self.max_tokens, "1 or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            allowed = f"0 to max_tokens, {self.max_tokens}"
            raise InvalidArgument("min_tokens", self.min_tokens, allowed)
        for field_name, low, high in (
            ("temperature", 0, 2),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, field_name)
            if not low <= value <= high:
                raise InvalidArgument(field_name, value, f"{low} to {high}")
        for field_name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, field_name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise InvalidArgument(field_name, number, f"0 to {MAX_LOGPROBS}")
        self._check_token_lists()

    def _check_token_lists(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            shown = f"{len(self.stop_token_ids)} ids"
            raise InvalidArgument("stop_token_ids", shown, f"at most {MAX_STOP_TOKEN_IDS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS_TOKENS:
            shown = f"{len(self.logit_bias)} tokens"
            raise InvalidArgument("logit_bias", shown, f"at most {MAX_LOGIT_BIAS_TOKENS}")
        for token_id, bias in self.logit_bias:
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                allowed = f"-{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
                raise InvalidArgument(f"logit_bias[{token_id}]", bias, allowed)

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Raise InvalidArgument unless the model has every token named, and one to choose."""
        ids_below = f"token ids 0 to {vocab_size - 1}"
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgument("stop_token_ids", token_id, ids_below)
        for token_id, _ in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgument("logit_bias", token_id, ids_below)
        if self.min_tokens and len(self.ending_token_ids(eos_token_ids)) >= vocab_size:
            raise InvalidArgument("min_tokens", self.min_tokens, "0: every token ends the text")

    def ending_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end the text, given those of the model."""
        does_eos_end = self.grammar is not None or not self.ignore_eos
        return frozenset(self.stop_token_ids).union(eos_token_ids if does_eos_end else ())


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the log of the probability that the model itself, unfiltered, gave it.

    The first token of a text has none: nothing predicts it.
    """

    token_id: int
    logprob: float | None
    token: bytes = b""  # its UTF-8 bytes, where known; part of a character perhaps


@dataclass(frozen=True)
class Logprobs:
    """The chosen token's logprob and those of the likeliest tokens, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


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

    prefill_s: float = 0.0
    first_step_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True)
class PrefillPeer:
    """A prefill worker to ask; where the epoch is known, only the process that has it."""

    address: str
    epoch: int | None = None


@dataclass(frozen=True)
class DecodeRequest:
    """What a router asks of a decode worker.

    The last `num_resumed_tokens` of the prompt are output that another worker made before.
    Cached keys and values are shared with requests of the same `cache_salt` only.
    The first token is due in `ttft_s` seconds, if it is due at all. `variant` as in `Member`.
    """

    request_id: str
    prompt: tuple[int, ...]
    level: int
    sampling: SamplingParams
    prefill_peers: tuple[PrefillPeer, ...]
    kv_identity: str
    num_resumed_tokens: int = 0
    cache_salt: str = ""
    ttft_s: float | None = None
    variant: str = ""


@dataclass(frozen=True)
class MoveLevel:
    """Make the tokens of a running request at another level from its next step on."""

    level: int


@dataclass(frozen=True)
class SegmentName:
    """Where a process of the same machine finds shared memory; `transport.shared_memory`.

    It is file `fd` of process `pid`, holds a ring of `ring_bytes` and begins with `nonce`.
    """

    pid: int
    fd: int
    ring_bytes: int
    nonce: int


@dataclass(frozen=True)
class PrefillRequest:
    """What a decode worker asks of a prefill worker: KV of tokens [ship_from, len(tokens)).

    `stream_id`, 64 random bits, ties the frames of the answer to this call; `codec` names one of
    `transport.codecs`. Cached keys and values are shared with requests of the same `cache_salt`
    only. The first token is due in `ttft_s` seconds, if it is due at all.
    Payloads may come through `segment`, if the worker can open it; else layer i comes by lane
    i % `num_lanes`, each of which is a call of its own.
    """

    request_id: str
    tokens: tuple[int, ...]
    ship_from: int
    kv_identity: str
    layout: KvLayout
    stream_id: int
    cache_salt: str = ""
    codec: str = "raw"
    ttft_s: float | None = None
    segment: SegmentName | None = None
    num_lanes: int = 1


@dataclass(frozen=True)
class Admitted:
    """The decode worker has reserved pages for a request."""

    num_cached_tokens: int


@dataclass(frozen=True)
class DecodedToken:
    """One token and the level that made it."""

    token_id: int
    level: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class ScoredPrompt:
    """The logprobs of the prompt's next tokens, the first event's from the first token on."""

    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True)
class Decoded:
    """A request's end at its decode worker."""

    reason: FinishReason
    num_cached_tokens: int
    num_shipped_tokens: int
    timings: StageTimings


DecodeEvent = Admitted | ScoredPrompt | DecodedToken | Decoded


@dataclass(frozen=True)
class StepCost:
    """A decode worker's measured step time.

    A step takes the sum over chains i of `chain_s[i]` (when any row uses the chain: its weights
    are read once), `row_s[i]` for each row beyond the first, `wide_row_s[i]` more for each beyond
    the first `NUM_NARROW_ROWS` (then arithmetic, not memory, sets the pace), and
    `cached_token_s[i]` for each token that one of the rows attends to.
    """

    NUM_NARROW_ROWS: ClassVar[int] = 8

    chain_s: tuple[float, ...]
    row_s: tuple[float, ...]
    wide_row_s: tuple[float, ...] = ()
    cached_token_s: tuple[float, ...] = ()

    def step_s(
        self, rows_per_chain: Sequence[int], cached_tokens_per_chain: Sequence[int] = ()
    ) -> float:
        """Predicted seconds of a step.

        Args:
            rows_per_chain: how many rows chain i serves.
            cached_tokens_per_chain: how many tokens they attend to, all rows together.
        """
        attended = cached_tokens_per_chain or (0,) * len(rows_per_chain)
        counts = zip(rows_per_chain, attended, strict=False)
        return sum(self.chain_step_s(chain, *each) for chain, each in enumerate(counts))

    def chain_step_s(self, chain: int, num_rows: float, num_cached_tokens: float) -> float:
        """One chain's part of a step; 0 where nothing has been measured of it."""
        if num_rows <= 0 or chain >= len(self.chain_s):
            return 0.0
        seconds = self.chain_s[chain] + self.row_s[chain] * (num_rows - 1)
        if num_rows > self.NUM_NARROW_ROWS and self.wide_row_s:
            seconds += self.wide_row_s[chain] * (num_rows - self.NUM_NARROW_ROWS)
        if self.cached_token_s:
            seconds += self.cached_token_s[chain] * num_cached_tokens
        return seconds


@dataclass(frozen=True)
class PrefillCost:
    """A prefill worker's measured time of a pass over up to `chunk_tokens` tokens.

    It takes `pass_s`, `token_s` for each token and `attended_key_s` for each key that one of them
    attends to: those before it and its own.
    """

    pass_s: float
    token_s: float
    attended_key_s: float
    chunk_tokens: int

    @staticmethod
    def num_attended_keys(start: int, stop: int) -> int:
        """Keys that the tokens [start, stop) of a prompt attend to, all together."""
        return (stop - start) * (start + stop + 1) // 2

    def seconds(self, start: int, stop: int) -> float:
        """Predicted seconds to compute the tokens [start, stop) of one prompt alone."""
        num_tokens = stop - start
        if num_tokens <= 0:
            return 0.0
        return (
            self.pass_s * -(-num_tokens // max(1, self.chunk_tokens))
            + self.token_s * num_tokens
            + self.attended_key_s * self.num_attended_keys(start, stop)
        )


@dataclass(frozen=True)
class TransferCost:
    """A decode worker's measured time of a call for keys and values, and of a token's on the way.

    0 until measured.
    """

    call_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True)
class DecodeStatus:
    """A decode worker's load; `num_running[k - 1]` counts the rows at level k.

    They attend to `num_attended[k - 1]` tokens, all together. It reserves pages for a prompt and up
    to `expected_output_tokens` of output. Of `num_drafted` tokens drafted `num_accepted` held.
    """

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
    expected_output_tokens: int
    num_preemptions: int
    num_drafted: int
    num_accepted: int
    num_attended: tuple[int, ...] = ()
    transfer_cost: TransferCost = TransferCost()


@dataclass(frozen=True)
class PrefillStatus:
    """A prefill worker's load: `queued_s` is what its `num_queued_tokens` are predicted to take.

    Since it started it has computed `num_computed_tokens` of prompts and found
    `num_cached_tokens` in its prefix cache.
    """

    worker_id: str
    epoch: int
    kv_identity: str
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    queued_s: float
    cost: PrefillCost
    num_free_pages: int
    num_pages: int
    num_computed_tokens: int
    num_cached_tokens: int


class WorkerKind(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Member:
    """A live worker. The epoch is new for every process, so a restart is never mistaken.

    A standby is a prefill worker's process that decodes too, at level 1, for as long as no other
    decode worker can. `variant` names the upper chains that a decode worker holds, "" for those
    of the cluster's own model; chain 1 is the same in all.
    """

    kind: WorkerKind
    worker_id: str
    address: str
    epoch: int
    kv_identity: str
    is_standby: bool = False
    variant: str = ""

    def __hash__(self) -> int:
        # Members are looked up a dozen times a request, and a string remembers its hash.
        return hash(self.worker_id)


@dataclass(frozen=True)
class Membership:
    """Who is in the cluster, as the controller last knew; a higher version replaces a lower.

    Those of the members that are `draining` take no new requests; what runs there goes on.
    """

    version: int = 0
    members: tuple[Member, ...] = field(default_factory=tuple)
    draining: frozenset[Member] = frozenset()

    def of_kind(self, kind: WorkerKind) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.kind is kind)
