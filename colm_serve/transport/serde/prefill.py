"""The messages of colm.v1.PrefillService."""

from __future__ import annotations

from colm_serve.core import PrefillCost, PrefillRequest, PrefillStatus, SegmentName
from colm_serve.proto.colm.v1 import prefill_pb2
from colm_serve.transport.serde.common import layout_from_proto, layout_to_proto


def prefill_request_to_proto(request: PrefillRequest) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(
        request_id=request.request_id,
        token_ids=request.tokens,
        ship_from=request.ship_from,
        kv_identity=request.kv_identity,
        layout=layout_to_proto(request.layout),
        stream_id=request.stream_id,
        cache_salt=request.cache_salt,
        codec=request.codec,
        ttft_s=request.ttft_s,
        segment=None if request.segment is None else _segment_to_proto(request.segment),
        num_lanes=request.num_lanes,
    )


def prefill_request_from_proto(message: prefill_pb2.PrefillRequest) -> PrefillRequest:
    return PrefillRequest(
        request_id=message.request_id,
        tokens=tuple(message.token_ids),
        ship_from=message.ship_from,
        kv_identity=message.kv_identity,
        layout=layout_from_proto(message.layout),
        stream_id=message.stream_id,
        cache_salt=message.cache_salt,
        codec=message.codec or "raw",
        ttft_s=message.ttft_s if message.HasField("ttft_s") else None,
        segment=_segment_from_proto(message.segment) if message.HasField("segment") else None,
        num_lanes=max(1, message.num_lanes),
    )


def _segment_to_proto(name: SegmentName) -> prefill_pb2.SegmentName:
    return prefill_pb2.SegmentName(
        pid=name.pid, fd=name.fd, ring_bytes=name.ring_bytes, nonce=name.nonce
    )


def _segment_from_proto(message: prefill_pb2.SegmentName) -> SegmentName:
    return SegmentName(message.pid, message.fd, message.ring_bytes, message.nonce)


def prefill_status_to_proto(status: PrefillStatus) -> prefill_pb2.PrefillStatus:
    return prefill_pb2.PrefillStatus(
        worker_id=status.worker_id,
        epoch=status.epoch,
        kv_identity=status.kv_identity,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        num_queued_tokens=status.num_queued_tokens,
        queued_s=status.queued_s,
        pass_s=status.cost.pass_s,
        token_s=status.cost.token_s,
        attended_key_s=status.cost.attended_key_s,
        chunk_tokens=status.cost.chunk_tokens,
        num_free_pages=status.num_free_pages,
        num_pages=status.num_pages,
        num_computed_tokens=status.num_computed_tokens,
        num_cached_tokens=status.num_cached_tokens,
    )


def prefill_status_from_proto(message: prefill_pb2.PrefillStatus) -> PrefillStatus:
    return PrefillStatus(
        worker_id=message.worker_id,
        epoch=message.epoch,
        kv_identity=message.kv_identity,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_queued_tokens=message.num_queued_tokens,
        queued_s=message.queued_s,
        cost=PrefillCost(
            pass_s=message.pass_s,
            token_s=message.token_s,
            attended_key_s=message.attended_key_s,
            chunk_tokens=message.chunk_tokens,
        ),
        num_free_pages=message.num_free_pages,
        num_pages=message.num_pages,
        num_computed_tokens=message.num_computed_tokens,
        num_cached_tokens=message.num_cached_tokens,
    )
