"""What a decode worker's call of a prefill worker asks for."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.core.kv_layout import KvLayout


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
