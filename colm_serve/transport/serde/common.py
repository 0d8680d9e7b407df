"""The messages that several services share."""

from __future__ import annotations

from colm_serve.core import (
    FLOAT_FIELDS,
    FinishReason,
    KvLayout,
    Logprobs,
    SamplingParams,
    ScoredPrompt,
    StageTimings,
    TokenLogprob,
    as_written,
)
from colm_serve.proto.colm.v1 import common_pb2
from colm_serve.transport.serde.grammar import grammar_from_proto, grammar_to_proto

_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
#: Floats whose absence does not mean 0.
_NEUTRAL_AT_ONE = ("temperature", "top_p", "repetition_penalty")
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
        **sampling_floats_from_proto(message),
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else seed,
        ignore_eos=message.ignore_eos,
        logit_bias=logit_bias_from_proto(message),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        grammar=grammar_from_proto(message),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def sampling_floats_from_proto(message: common_pb2.SamplingParams) -> dict[str, float]:
    """The fields of `FLOAT_FIELDS`, as their sender most likely wrote them."""
    floats = {field: as_written(getattr(message, field)) for field in FLOAT_FIELDS}
    absent = (f for f in _NEUTRAL_AT_ONE if not message.HasField(f))
    return floats | dict.fromkeys(absent, 1.0)


def logit_bias_from_proto(message: common_pb2.SamplingParams) -> tuple[tuple[int, float], ...]:
    """By token id, as their sender most likely wrote them."""
    return tuple((i, as_written(bias)) for i, bias in sorted(message.logit_bias.items()))


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=sampling.stop_token_ids,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        grammar=grammar_to_proto(sampling.grammar),
        prompt_logprobs=sampling.prompt_logprobs,
    )


def finish_reason_to_proto(reason: FinishReason) -> common_pb2.FinishReason:
    return _REASONS[reason]


def finish_reason_from_proto(reason: common_pb2.FinishReason) -> FinishReason:
    return _REASONS_BACK[reason]


def timings_to_proto(timings: StageTimings) -> common_pb2.StageTimings:
    return common_pb2.StageTimings(
        prefill_s=timings.prefill_s,
        first_step_s=timings.first_step_s,
        decode_s=timings.decode_s,
        ttft_s=timings.ttft_s,
    )


def timings_from_proto(message: common_pb2.StageTimings) -> StageTimings:
    return StageTimings(
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


def logprobs_to_proto(logprobs: Logprobs | None) -> common_pb2.Logprobs | None:
    return None if logprobs is None else _logprobs_to_proto(logprobs)


def _logprobs_to_proto(logprobs: Logprobs) -> common_pb2.Logprobs:
    return common_pb2.Logprobs(
        chosen=_token_logprob_to_proto(logprobs.chosen),
        top=[_token_logprob_to_proto(entry) for entry in logprobs.top],
    )


def logprobs_from_proto(message: common_pb2.Logprobs) -> Logprobs:
    return Logprobs(
        _token_logprob_from_proto(message.chosen),
        tuple(_token_logprob_from_proto(entry) for entry in message.top),
    )


def scored_prompt_to_proto(event: ScoredPrompt) -> common_pb2.ScoredPrompt:
    message = common_pb2.ScoredPrompt()
    for entry in event.logprobs:
        message.logprobs.append(_logprobs_to_proto(entry))
    return message


def scored_prompt_from_proto(message: common_pb2.ScoredPrompt) -> ScoredPrompt:
    return ScoredPrompt(tuple(map(logprobs_from_proto, message.logprobs)))


def _token_logprob_to_proto(entry: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=entry.token_id, logprob=entry.logprob, token=entry.token
    )


def _token_logprob_from_proto(message: common_pb2.TokenLogprob) -> TokenLogprob:
    logprob = message.logprob if message.HasField("logprob") else None
    return TokenLogprob(message.token_id, logprob, message.token)
