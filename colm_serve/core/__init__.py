"""The plain values that travel between the rooms. No torch, grpc or ray here.

Protobuf objects become these at `transport.serde` and go no further.
"""

from colm_serve.core.costs import PrefillCost, StepCost, TransferCost
from colm_serve.core.decode_call import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    FinishReason,
    MoveLevel,
    PrefillPeer,
    ScoredPrompt,
    StageTimings,
)
from colm_serve.core.health import Health
from colm_serve.core.kv_layout import KvLayout
from colm_serve.core.logprobs import Logprobs, TokenLogprob
from colm_serve.core.membership import Member, Membership, WorkerKind
from colm_serve.core.prefill_call import PrefillRequest, SegmentName
from colm_serve.core.sampling import (
    FLOAT_FIELDS,
    MAX_LOGIT_BIAS_TOKENS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    as_carried,
    as_written,
)
from colm_serve.core.status import DecodeStatus, PrefillStatus

__all__ = [
    "FLOAT_FIELDS",
    "MAX_LOGIT_BIAS_TOKENS",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "MAX_STOP_TOKEN_IDS",
    "Admitted",
    "DecodeEvent",
    "DecodeRequest",
    "DecodeStatus",
    "Decoded",
    "DecodedToken",
    "FinishReason",
    "Health",
    "KvLayout",
    "Logprobs",
    "Member",
    "Membership",
    "MoveLevel",
    "PrefillCost",
    "PrefillPeer",
    "PrefillRequest",
    "PrefillStatus",
    "SamplingParams",
    "ScoredPrompt",
    "SegmentName",
    "StageTimings",
    "StepCost",
    "TokenLogprob",
    "TransferCost",
    "WorkerKind",
    "as_carried",
    "as_written",
]
