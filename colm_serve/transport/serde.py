"""Protobuf to plain values and back: generated classes stop here."""

from __future__ import annotations

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    KvLayout,
    MoveLevel,
    PrefillRequest,
    PrefillStatus,
    SamplingParams,
    StageTimings,
    StepCost,
)
from colm_serve.errors import InvalidArgument
from colm_serve.proto.colm.v1 import common_pb2, decode_pb2, prefill_pb2

_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_REASONS_BACK = {value: key for key, value in _REASONS.items()}


def sampling_from_proto(
    message: common_pb2.SamplingParams, *, max_tokens: int, seed: int
) -> SamplingParams:
    """Read sampling parameters; `max_tokens` and `seed` stand in where the message has none.

    Raises:
        InvalidArgument: a value that is not allowed.
    """
    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else max_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else seed,
        ignore_eos=message.ignore_eos,
    )


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
    )


def finish_reason_to_proto(reason: FinishReason) -> common_pb2.FinishReason:
    return _REASONS[reason]


def finish_reason_from_proto(reason: common_pb2.FinishReason) -> FinishReason:
    return _REASONS_BACK[reason]


def timings_to_proto(timings: StageTimings) -> common_pb2.StageTimings:
    return common_pb2.StageTimings(
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        first_step_s=timings.first_step_s,
        decode_s=timings.decode_s,
        ttft_s=timings.ttft_s,
    )


def timings_from_proto(message: common_pb2.StageTimings) -> StageTimings:
    return StageTimings(
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        first_step_s=message.first_step_s,
        decode_s=message.decode_s,
        ttft_s=message.ttft_s,
    )


def layout_to_proto(layout: KvLayout) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )


def layout_from_proto(message: common_pb2.KvLayout) -> KvLayout:
    return KvLayout(message.num_layers, message.num_kv_heads, message.head_dim, message.dtype)


def decode_start_to_proto(request: DecodeRequest) -> decode_pb2.DecodeControl:
    start = decode_pb2.DecodeStart(
        request_id=request.request_id,
        prompt_token_ids=request.prompt,
        level=request.level,
        sampling=sampling_to_proto(request.sampling),
        prefill_addresses=request.prefill_addresses,
        kv_identity=request.kv_identity,
    )
    return decode_pb2.DecodeControl(start=start)


def decode_start_from_proto(message: decode_pb2.DecodeControl) -> DecodeRequest:
    """Read the first message of a Decode stream.

    Raises:
        InvalidArgument: not a start, or a sampling value that is not allowed.
    """
    if not message.HasField("start"):
        raise InvalidArgument("control", message.WhichOneof("control"), "start, as the first")
    start = message.start
    for field in ("max_tokens", "seed"):
        if not start.sampling.HasField(field):
            raise InvalidArgument(f"sampling.{field}", None, "a value, set by the router")
    return DecodeRequest(
        request_id=start.request_id,
        prompt=tuple(start.prompt_token_ids),
        level=start.level,
        sampling=sampling_from_proto(start.sampling, max_tokens=1, seed=0),
        prefill_addresses=tuple(start.prefill_addresses),
        kv_identity=start.kv_identity,
    )


def move_level_to_proto(move: MoveLevel) -> decode_pb2.DecodeControl:
    return decode_pb2.DecodeControl(move_level=decode_pb2.MoveLevel(level=move.level))


def move_level_from_proto(message: decode_pb2.DecodeControl) -> MoveLevel:
    """Read a later message of a Decode stream; raises InvalidArgument for another `start`."""
    if not message.HasField("move_level"):
        raise InvalidArgument("control", message.WhichOneof("control"), "move_level")
    return MoveLevel(message.move_level.level)


def decode_event_to_proto(event: DecodeEvent) -> decode_pb2.DecodeEvent:
    match event:
        case Admitted():
            admitted = decode_pb2.Admitted(num_cached_tokens=event.num_cached_tokens)
            return decode_pb2.DecodeEvent(admitted=admitted)
        case DecodedToken():
            token = decode_pb2.DecodedToken(token_id=event.token_id, level=event.level)
            return decode_pb2.DecodeEvent(token=token)
        case Decoded():
            finished = decode_pb2.Decoded(
                reason=finish_reason_to_proto(event.reason),
                num_cached_tokens=event.num_cached_tokens,
                num_shipped_tokens=event.num_shipped_tokens,
                timings=timings_to_proto(event.timings),
            )
            return decode_pb2.DecodeEvent(finished=finished)


def decode_event_from_proto(message: decode_pb2.DecodeEvent) -> DecodeEvent:
    match message.WhichOneof("event"):
        case "admitted":
            return Admitted(message.admitted.num_cached_tokens)
        case "token":
            return DecodedToken(message.token.token_id, message.token.level)
        case "finished":
            finished = message.finished
            return Decoded(
                reason=finish_reason_from_proto(finished.reason),
                num_cached_tokens=finished.num_cached_tokens,
                num_shipped_tokens=finished.num_shipped_tokens,
                timings=timings_from_proto(finished.timings),
            )
        case other:
            raise InvalidArgument("event", other, "admitted, token or finished")


def prefill_request_to_proto(request: PrefillRequest) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(
        request_id=request.request_id,
        token_ids=request.tokens,
        ship_from=request.ship_from,
        kv_identity=request.kv_identity,
        layout=layout_to_proto(request.layout),
    )


def prefill_request_from_proto(message: prefill_pb2.PrefillRequest) -> PrefillRequest:
    return PrefillRequest(
        request_id=message.request_id,
        tokens=tuple(message.token_ids),
        ship_from=message.ship_from,
        kv_identity=message.kv_identity,
        layout=layout_from_proto(message.layout),
    )


def decode_status_to_proto(status: DecodeStatus) -> decode_pb2.DecodeStatus:
    return decode_pb2.DecodeStatus(
        worker_id=status.worker_id,
        epoch=status.epoch,
        kv_identity=status.kv_identity,
        num_levels=status.num_levels,
        max_rows=status.max_rows,
        num_waiting=status.num_waiting,
        num_running=status.num_running,
        num_free_pages=status.num_free_pages,
        num_pages=status.num_pages,
        page_size=status.page_size,
        chain_s=status.step_cost.chain_s,
        row_s=status.step_cost.row_s,
        prefill_tokens_per_s=status.prefill_tokens_per_s,
    )


def decode_status_from_proto(message: decode_pb2.DecodeStatus) -> DecodeStatus:
    return DecodeStatus(
        worker_id=message.worker_id,
        epoch=message.epoch,
        kv_identity=message.kv_identity,
        num_levels=message.num_levels,
        max_rows=message.max_rows,
        num_waiting=message.num_waiting,
        num_running=tuple(message.num_running),
        num_free_pages=message.num_free_pages,
        num_pages=message.num_pages,
        page_size=message.page_size,
        step_cost=StepCost(tuple(message.chain_s), tuple(message.row_s)),
        prefill_tokens_per_s=message.prefill_tokens_per_s,
    )


def prefill_status_to_proto(status: PrefillStatus) -> prefill_pb2.PrefillStatus:
    return prefill_pb2.PrefillStatus(
        worker_id=status.worker_id,
        epoch=status.epoch,
        kv_identity=status.kv_identity,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        num_queued_tokens=status.num_queued_tokens,
        tokens_per_s=status.tokens_per_s,
        num_free_pages=status.num_free_pages,
        num_pages=status.num_pages,
    )


def prefill_status_from_proto(message: prefill_pb2.PrefillStatus) -> PrefillStatus:
    return PrefillStatus(
        worker_id=message.worker_id,
        epoch=message.epoch,
        kv_identity=message.kv_identity,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_queued_tokens=message.num_queued_tokens,
        tokens_per_s=message.tokens_per_s,
        num_free_pages=message.num_free_pages,
        num_pages=message.num_pages,
    )
