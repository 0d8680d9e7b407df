from colm_serve.proto.colm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeStart(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "level", "sampling", "prefill_peers", "kv_identity", "num_resumed_tokens", "cache_salt", "ttft_s", "variant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PEERS_FIELD_NUMBER: _ClassVar[int]
    KV_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    level: int
    sampling: _common_pb2.SamplingParams
    prefill_peers: _containers.RepeatedCompositeFieldContainer[PrefillPeer]
    kv_identity: str
    num_resumed_tokens: int
    cache_salt: str
    ttft_s: float
    variant: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., level: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., prefill_peers: _Optional[_Iterable[_Union[PrefillPeer, _Mapping]]] = ..., kv_identity: _Optional[str] = ..., num_resumed_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ..., ttft_s: _Optional[float] = ..., variant: _Optional[str] = ...) -> None: ...

class PrefillPeer(_message.Message):
    __slots__ = ("address", "epoch")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    address: str
    epoch: int
    def __init__(self, address: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class MoveLevelRequest(_message.Message):
    __slots__ = ("request_id", "level")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    level: int
    def __init__(self, request_id: _Optional[str] = ..., level: _Optional[int] = ...) -> None: ...

class MoveLevelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("admitted", "token", "finished", "scored_prompt")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    SCORED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    token: DecodedToken
    finished: Decoded
    scored_prompt: _common_pb2.ScoredPrompt
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., token: _Optional[_Union[DecodedToken, _Mapping]] = ..., finished: _Optional[_Union[Decoded, _Mapping]] = ..., scored_prompt: _Optional[_Union[_common_pb2.ScoredPrompt, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("num_cached_tokens",)
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_cached_tokens: int
    def __init__(self, num_cached_tokens: _Optional[int] = ...) -> None: ...

class DecodedToken(_message.Message):
    __slots__ = ("token_id", "level", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    level: int
    logprobs: _common_pb2.Logprobs
    def __init__(self, token_id: _Optional[int] = ..., level: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.Logprobs, _Mapping]] = ...) -> None: ...

class Decoded(_message.Message):
    __slots__ = ("reason", "num_cached_tokens", "num_shipped_tokens", "timings")
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    num_cached_tokens: int
    num_shipped_tokens: int
    timings: _common_pb2.StageTimings
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., num_cached_tokens: _Optional[int] = ..., num_shipped_tokens: _Optional[int] = ..., timings: _Optional[_Union[_common_pb2.StageTimings, _Mapping]] = ...) -> None: ...

class DecodeStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeStatus(_message.Message):
    __slots__ = ("worker_id", "epoch", "kv_identity", "num_levels", "max_rows", "num_waiting", "num_running", "num_free_pages", "num_pages", "page_size", "chain_s", "row_s", "prefill_tokens_per_s", "expected_output_tokens", "num_preemptions", "wide_row_s", "cached_token_s", "num_drafted", "num_accepted", "num_attended", "transfer_call_s", "transfer_token_s", "num_failed_rows")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NUM_LEVELS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_S_FIELD_NUMBER: _ClassVar[int]
    ROW_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    WIDE_ROW_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTENDED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_CALL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_ROWS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    kv_identity: str
    num_levels: int
    max_rows: int
    num_waiting: int
    num_running: _containers.RepeatedScalarFieldContainer[int]
    num_free_pages: int
    num_pages: int
    page_size: int
    chain_s: _containers.RepeatedScalarFieldContainer[float]
    row_s: _containers.RepeatedScalarFieldContainer[float]
    prefill_tokens_per_s: float
    expected_output_tokens: int
    num_preemptions: int
    wide_row_s: _containers.RepeatedScalarFieldContainer[float]
    cached_token_s: _containers.RepeatedScalarFieldContainer[float]
    num_drafted: int
    num_accepted: int
    num_attended: _containers.RepeatedScalarFieldContainer[int]
    transfer_call_s: float
    transfer_token_s: float
    num_failed_rows: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., kv_identity: _Optional[str] = ..., num_levels: _Optional[int] = ..., max_rows: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[_Iterable[int]] = ..., num_free_pages: _Optional[int] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., chain_s: _Optional[_Iterable[float]] = ..., row_s: _Optional[_Iterable[float]] = ..., prefill_tokens_per_s: _Optional[float] = ..., expected_output_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., wide_row_s: _Optional[_Iterable[float]] = ..., cached_token_s: _Optional[_Iterable[float]] = ..., num_drafted: _Optional[int] = ..., num_accepted: _Optional[int] = ..., num_attended: _Optional[_Iterable[int]] = ..., transfer_call_s: _Optional[float] = ..., transfer_token_s: _Optional[float] = ..., num_failed_rows: _Optional[int] = ...) -> None: ...
