"""What goes up and down a router's call of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from colm_serve.core.logprobs import Logprobs
from colm_serve.core.sampling import SamplingParams


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

    request_id: str
    level: int


@dataclass(frozen=True)
class Admitted:
    """The decode worker has reserved pages for a request."""

    num_cached_tokens: int


@dataclass(frozen=True)
class ScoredPrompt:
    """The logprobs of the prompt's next tokens, the first event's from the first token on."""

    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True)
class DecodedToken:
    """One token and the level that made it."""

    token_id: int
    level: int
    logprobs: Logprobs | None = None


class FinishReason(Enum):
    """Why a generation ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class StageTimings:
    """Where a request's time went, in seconds."""

    prefill_s: float = 0.0
    first_step_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """A request's end at its decode worker."""

    reason: FinishReason
    num_cached_tokens: int
    num_shipped_tokens: int
    timings: StageTimings


DecodeEvent = Admitted | ScoredPrompt | DecodedToken | Decoded
