"""colm.v1.GenerationService's messages to plain values and back; for the service and clients."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from colm_serve.config import LimitsConfig
from colm_serve.core import (
    FLOAT_FIELDS,
    MAX_LOGIT_BIAS_TOKENS,
    MAX_STOP_TOKEN_IDS,
    ScoredPrompt,
    as_carried,
)
from colm_serve.errors import DataLoss, InvalidArgument
from colm_serve.proto.colm.v1 import common_pb2, generation_pb2
from colm_serve.router.cluster_status import ClusterStatus, WorkerState
from colm_serve.router.request import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Prompt,
    Started,
    TextPrompt,
    Token,
    TokenPrompt,
    Usage,
)
from colm_serve.router.sizes import check_count, check_sizes
from colm_serve.transport.serde import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    grammar_from_proto,
    grammar_to_proto,
    logit_bias_from_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_floats_from_proto,
    scored_prompt_from_proto,
    scored_prompt_to_proto,
    timings_from_proto,
    timings_to_proto,
)


def request_to_proto(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """Raises InvalidArgument when a number does not fit its field, or a float its bounds."""
    try:
        message = generation_pb2.GenerateRequest(
            model=request.model,
            sampling=common_pb2.SamplingParams(
                top_k=request.top_k,
                seed=request.seed,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                logit_bias={
                    i: as_carried("logit_bias", bias, f"[{i}]") for i, bias in request.logit_bias
                },
                stop_token_ids=request.stop_token_ids,
                min_tokens=request.min_tokens,
                logprobs=request.logprobs,
                grammar=grammar_to_proto(request.grammar),
                prompt_logprobs=request.prompt_logprobs,
                **{f: as_carried(f, getattr(request, f)) for f in FLOAT_FIELDS},
            ),
            stop=request.stop,
            sla_class=request.sla_class,
            level=request.level,
            min_level=request.min_level,
            max_level=request.max_level,
            cache_salt=request.cache_salt,
            ttft_ms=request.ttft_ms,
            tpot_ms=request.tpot_ms,
            deadline_s=request.deadline_s,
            add_special_tokens=request.add_special_tokens,
            parse_special=request.parse_special,
        )
        _set_prompt(message, request.prompt)
    except (ValueError, TypeError) as error:
        raise InvalidArgument("request", request, f"values that fit the wire ({error})") from error
    return message


def _set_prompt(message: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    match prompt:
        case TextPrompt(text):
            message.prompt = text
        case TokenPrompt(token_ids):
            message.prompt_token_ids.CopyFrom(generation_pb2.TokenIds(ids=token_ids))
        case ChatPrompt(messages):
            chat = generation_pb2.Chat()
            for m in messages:
                chat.messages.add(role=m.role, content=m.content)
            message.chat.CopyFrom(chat)


def read_request(raw: bytes, limits: LimitsConfig) -> GenerationRequest:
    """A GenerateRequest that was sent; raises InvalidArgument as `request_from_proto`."""
    try:
        message = generation_pb2.GenerateRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument("request", raw, f"a message that parses ({error})") from error
    request = request_from_proto(message, limits)
    check_sizes(request, limits)
    return request


def request_from_proto(
    message: generation_pb2.GenerateRequest, limits: LimitsConfig
) -> GenerationRequest:
    """Raises InvalidArgument for too much, for no prompt, and for what is no grammar."""
    sampling = message.sampling
    for field, values, most in (
        ("prompt", message.prompt_token_ids.ids, limits.max_token_ids),
        ("messages", message.chat.messages, limits.max_messages),
        ("stop", message.stop, limits.max_stop_strings),
        ("logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS_TOKENS),
        ("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKEN_IDS),
    ):
        check_count(field, len(values), most)
    return GenerationRequest(
        prompt=_prompt_from_proto(message),
        model=message.model,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        ignore_eos=sampling.ignore_eos,
        logit_bias=logit_bias_from_proto(sampling),
        **sampling_floats_from_proto(sampling),
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        grammar=grammar_from_proto(sampling),
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        stop=tuple(message.stop),
        sla_class=message.sla_class or None,
        level=message.level if message.HasField("level") else None,
        min_level=message.min_level if message.HasField("min_level") else None,
        max_level=message.max_level if message.HasField("max_level") else None,
        cache_salt=message.cache_salt,
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else None,
        tpot_ms=message.tpot_ms if message.HasField("tpot_ms") else None,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        add_special_tokens=not _is_false(message, "add_special_tokens"),
        parse_special=not _is_false(message, "parse_special"),
    )


def _is_false(message: generation_pb2.GenerateRequest, field: str) -> bool:
    """Whether a field that is true by default is there, and false."""
    return message.HasField(field) and not getattr(message, field)


def _prompt_from_proto(message: generation_pb2.GenerateRequest) -> Prompt:
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "prompt_token_ids":
            return TokenPrompt(tuple(message.prompt_token_ids.ids))
        case "chat":
            return ChatPrompt(tuple(ChatMessage(m.role, m.content) for m in message.chat.messages))
        case other:
            raise InvalidArgument("input", other, "prompt, prompt_token_ids or chat")


def event_to_proto(event: GenerationEvent) -> generation_pb2.GenerateEvent:
    match event:
        case Started():
            started = generation_pb2.Started(
                request_id=event.request_id,
                model=event.model,
                level=event.level,
                is_brownout=event.is_brownout,
            )
            return generation_pb2.GenerateEvent(started=started)
        case ScoredPrompt():
            return generation_pb2.GenerateEvent(scored_prompt=scored_prompt_to_proto(event))
        case Token():
            token = generation_pb2.Token(
                token_id=event.token_id,
                text=event.text,
                level=event.level,
                logprobs=logprobs_to_proto(event.logprobs),
            )
            return generation_pb2.GenerateEvent(token=token)
        case Finished():
            finished = generation_pb2.Finished(
                reason=finish_reason_to_proto(event.reason),
                usage=generation_pb2.Usage(
                    num_prompt_tokens=event.usage.num_prompt_tokens,
                    num_cached_tokens=event.usage.num_cached_tokens,
                    num_shipped_tokens=event.usage.num_shipped_tokens,
                    num_output_tokens=event.usage.num_output_tokens,
                ),
                timings=timings_to_proto(event.timings),
                text=event.text,
            )
            return generation_pb2.GenerateEvent(finished=finished)


def event_from_proto(message: generation_pb2.GenerateEvent) -> GenerationEvent:
    """Raises DataLoss for an event of no kind that is known here."""
    match message.WhichOneof("event"):
        case "started":
            started = message.started
            return Started(started.request_id, started.model, started.level, started.is_brownout)
        case "scored_prompt":
            return scored_prompt_from_proto(message.scored_prompt)
        case "token":
            token = message.token
            logprobs = logprobs_from_proto(token.logprobs) if token.HasField("logprobs") else None
            return Token(token.token_id, token.text, token.level, logprobs)
        case "finished":
            finished = message.finished
            return Finished(
                reason=finish_reason_from_proto(finished.reason),
                usage=Usage(
                    num_prompt_tokens=finished.usage.num_prompt_tokens,
                    num_cached_tokens=finished.usage.num_cached_tokens,
                    num_shipped_tokens=finished.usage.num_shipped_tokens,
                    num_output_tokens=finished.usage.num_output_tokens,
                ),
                timings=timings_from_proto(finished.timings),
                text=finished.text,
            )
        case other:
            raise DataLoss(f"event {other!r} is none of started, scored_prompt, token, finished")


def cluster_status_to_proto(status: ClusterStatus) -> generation_pb2.ClusterStatus:
    return generation_pb2.ClusterStatus(
        model=status.model,
        num_levels=status.num_levels,
        membership_version=status.membership_version,
        workers=[
            generation_pb2.WorkerState(
                kind=worker.kind,
                worker_id=worker.worker_id,
                address=worker.address,
                epoch=worker.epoch,
                is_reachable=worker.is_reachable,
                num_running=worker.num_running,
                num_waiting=worker.num_waiting,
                num_free_pages=worker.num_free_pages,
                num_pages=worker.num_pages,
                num_preemptions=worker.num_preemptions,
                variant=worker.variant,
            )
            for worker in status.workers
        ],
    )


def cluster_status_from_proto(message: generation_pb2.ClusterStatus) -> ClusterStatus:
    return ClusterStatus(
        model=message.model,
        num_levels=message.num_levels,
        membership_version=message.membership_version,
        workers=tuple(
            WorkerState(
                kind=worker.kind,
                worker_id=worker.worker_id,
                address=worker.address,
                epoch=worker.epoch,
                is_reachable=worker.is_reachable,
                num_running=worker.num_running,
                num_waiting=worker.num_waiting,
                num_free_pages=worker.num_free_pages,
                num_pages=worker.num_pages,
                num_preemptions=worker.num_preemptions,
                variant=worker.variant,
            )
            for worker in message.workers
        ),
    )
