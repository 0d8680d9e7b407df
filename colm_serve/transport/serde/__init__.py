"""Protobuf to plain values and back: generated classes stop here."""

from colm_serve.transport.serde.common import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    layout_from_proto,
    layout_to_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    scored_prompt_from_proto,
    scored_prompt_to_proto,
    timings_from_proto,
    timings_to_proto,
)
from colm_serve.transport.serde.decode import (
    decode_event_from_proto,
    decode_event_to_proto,
    decode_start_from_proto,
    decode_start_to_proto,
    decode_status_from_proto,
    decode_status_to_proto,
    move_level_from_proto,
    move_level_to_proto,
)
from colm_serve.transport.serde.grammar import grammar_from_proto, grammar_to_proto
from colm_serve.transport.serde.prefill import (
    prefill_request_from_proto,
    prefill_request_to_proto,
    prefill_status_from_proto,
    prefill_status_to_proto,
)

__all__ = [
    "decode_event_from_proto",
    "decode_event_to_proto",
    "decode_start_from_proto",
    "decode_start_to_proto",
    "decode_status_from_proto",
    "decode_status_to_proto",
    "finish_reason_from_proto",
    "finish_reason_to_proto",
    "grammar_from_proto",
    "grammar_to_proto",
    "layout_from_proto",
    "layout_to_proto",
    "logprobs_from_proto",
    "logprobs_to_proto",
    "move_level_from_proto",
    "move_level_to_proto",
    "prefill_request_from_proto",
    "prefill_request_to_proto",
    "prefill_status_from_proto",
    "prefill_status_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "scored_prompt_from_proto",
    "scored_prompt_to_proto",
    "timings_from_proto",
    "timings_to_proto",
]
