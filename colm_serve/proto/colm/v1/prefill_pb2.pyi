from colm_serve.proto.colm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "ship_from", "kv_identity", "layout", "stream_id", "cache_salt", "codec", "ttft_s", "segment", "num_lanes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SHIP_FROM_FIELD_NUMBER: _ClassVar[int]
    KV_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    NUM_LANES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ship_from: int
    kv_identity: str
    layout: _common_pb2.KvLayout
    stream_id: int
    cache_salt: str
    codec: str
    ttft_s: float
    segment: SegmentName
    num_lanes: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., ship_from: _Optional[int] = ..., kv_identity: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., stream_id: _Optional[int] = ..., cache_salt: _Optional[str] = ..., codec: _Optional[str] = ..., ttft_s: _Optional[float] = ..., segment: _Optional[_Union[SegmentName, _Mapping]] = ..., num_lanes: _Optional[int] = ...) -> None: ...

class PrefillLaneRequest(_message.Message):
    __slots__ = ("stream_id", "lane")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    lane: int
    def __init__(self, stream_id: _Optional[int] = ..., lane: _Optional[int] = ...) -> None: ...

class SegmentName(_message.Message):
    __slots__ = ("pid", "fd", "ring_bytes", "nonce")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    ring_bytes: int
    nonce: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., ring_bytes: _Optional[int] = ..., nonce: _Optional[int] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("header", "payload", "digest")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    payload: bytes
    digest: int
    def __init__(self, header: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., digest: _Optional[int] = ...) -> None: ...

class PrefillStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillStatus(_message.Message):
    __slots__ = ("worker_id", "epoch", "kv_identity", "num_running", "num_waiting", "num_queued_tokens", "queued_s", "num_free_pages", "num_pages", "num_computed_tokens", "num_cached_tokens", "pass_s", "token_s", "attended_key_s", "chunk_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASS_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_KEY_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    kv_identity: str
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    queued_s: float
    num_free_pages: int
    num_pages: int
    num_computed_tokens: int
    num_cached_tokens: int
    pass_s: float
    token_s: float
    attended_key_s: float
    chunk_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., kv_identity: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_queued_tokens: _Optional[int] = ..., queued_s: _Optional[float] = ..., num_free_pages: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., pass_s: _Optional[float] = ..., token_s: _Optional[float] = ..., attended_key_s: _Optional[float] = ..., chunk_tokens: _Optional[int] = ...) -> None: ...
