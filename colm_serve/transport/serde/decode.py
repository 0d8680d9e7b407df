"""The messages of colm.v1.DecodeService."""

from __future__ import annotations

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    DecodeStatus,
    MoveLevel,
    PrefillPeer,
    ScoredPrompt,
    StepCost,
    TransferCost,
)
from colm_serve.errors import InvalidArgument
from colm_serve.proto.colm.v1 import decode_pb2
from colm_serve.transport.serde.common import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    scored_prompt_from_proto,
    scored_prompt_to_proto,
    timings_from_proto,
    timings_to_proto,
)


def decode_start_to_proto(request: DecodeRequest) -> decode_pb2.DecodeStart:
    return decode_pb2.DecodeStart(
        request_id=request.request_id,
        prompt_token_ids=request.prompt,
        level=request.level,
        sampling=sampling_to_proto(request.sampling),
        prefill_peers=map(_peer_to_proto, request.prefill_peers),
        kv_identity=request.kv_identity,
        num_resumed_tokens=request.num_resumed_tokens,
        cache_salt=request.cache_salt,
        ttft_s=request.ttft_s,
        variant=request.variant,
    )


def decode_start_from_proto(start: decode_pb2.DecodeStart) -> DecodeRequest:
    """Read what a Decode call asks for; raises InvalidArgument for a value not allowed."""
    for field in ("max_tokens", "seed"):
        if not start.sampling.HasField(field):
            raise InvalidArgument(f"sampling.{field}", None, "a value, set by the router")
    return DecodeRequest(
        request_id=start.request_id,
        prompt=tuple(start.prompt_token_ids),
        level=start.level,
        sampling=sampling_from_proto(start.sampling, max_tokens=1, seed=0),
        prefill_peers=tuple(map(_peer_from_proto, start.prefill_peers)),
        kv_identity=start.kv_identity,
        num_resumed_tokens=start.num_resumed_tokens,
        cache_salt=start.cache_salt,
        ttft_s=start.ttft_s if start.HasField("ttft_s") else None,
        variant=start.variant,
    )


def _peer_to_proto(peer: PrefillPeer) -> decode_pb2.PrefillPeer:
    return decode_pb2.PrefillPeer(address=peer.address, epoch=peer.epoch)


def _peer_from_proto(message: decode_pb2.PrefillPeer) -> PrefillPeer:
    return PrefillPeer(message.address, message.epoch if message.HasField("epoch") else None)


def move_level_to_proto(move: MoveLevel) -> decode_pb2.MoveLevelRequest:
    return decode_pb2.MoveLevelRequest(request_id=move.request_id, level=move.level)


def move_level_from_proto(message: decode_pb2.MoveLevelRequest) -> MoveLevel:
    return MoveLevel(message.request_id, message.level)


def decode_event_to_proto(event: DecodeEvent) -> decode_pb2.DecodeEvent:
    match event:
        case Admitted():
            admitted = decode_pb2.Admitted(num_cached_tokens=event.num_cached_tokens)
            return decode_pb2.DecodeEvent(admitted=admitted)
        case ScoredPrompt():
            return decode_pb2.DecodeEvent(scored_prompt=scored_prompt_to_proto(event))
        case DecodedToken():
            token = decode_pb2.DecodedToken(
                token_id=event.token_id,
                level=event.level,
                logprobs=logprobs_to_proto(event.logprobs),
            )
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
        case "scored_prompt":
            return scored_prompt_from_proto(message.scored_prompt)
        case "token":
            token = message.token
            logprobs = logprobs_from_proto(token.logprobs) if token.HasField("logprobs") else None
            return DecodedToken(token.token_id, token.level, logprobs)
        case "finished":
            finished = message.finished
            return Decoded(
                reason=finish_reason_from_proto(finished.reason),
                num_cached_tokens=finished.num_cached_tokens,
                num_shipped_tokens=finished.num_shipped_tokens,
                timings=timings_from_proto(finished.timings),
            )
        case other:
            raise InvalidArgument("event", other, "admitted, scored_prompt, token or finished")


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
        expected_output_tokens=status.expected_output_tokens,
        num_preemptions=status.num_preemptions,
        wide_row_s=status.step_cost.wide_row_s,
        cached_token_s=status.step_cost.cached_token_s,
        num_drafted=status.num_drafted,
        num_accepted=status.num_accepted,
        num_attended=status.num_attended,
        transfer_call_s=status.transfer_cost.call_s,
        transfer_token_s=status.transfer_cost.token_s,
        num_failed_rows=status.num_failed_rows,
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
        step_cost=StepCost(
            tuple(message.chain_s),
            tuple(message.row_s),
            tuple(message.wide_row_s),
            tuple(message.cached_token_s),
        ),
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        expected_output_tokens=message.expected_output_tokens,
        num_preemptions=message.num_preemptions,
        num_drafted=message.num_drafted,
        num_accepted=message.num_accepted,
        num_attended=tuple(message.num_attended),
        transfer_cost=TransferCost(message.transfer_call_s, message.transfer_token_s),
        num_failed_rows=message.num_failed_rows,
    )
