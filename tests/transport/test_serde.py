"""What goes to protobuf comes back the same, over the wire's bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.core import (
    MAX_SEED,
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    DecodeStatus,
    FinishReason,
    KvLayout,
    Logprobs,
    MoveLevel,
    PrefillCost,
    PrefillPeer,
    PrefillRequest,
    PrefillStatus,
    SamplingParams,
    StageTimings,
    StepCost,
    TokenLogprob,
    TransferCost,
)
from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.proto.colm.v1 import common_pb2, decode_pb2, prefill_pb2
from colm_serve.transport import serde

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
seconds = st.floats(0, 1e9)
tokens = st.lists(uint32, max_size=20).map(tuple)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 2),
    top_p=st.floats(1e-9, 1),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, MAX_SEED),
    ignore_eos=st.booleans(),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(uint32, st.floats(-100, 100), max_size=9).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
    stop_token_ids=st.lists(uint32, max_size=64).map(tuple),
    min_tokens=st.integers(0, 1),
    logprobs=st.none() | st.integers(0, 20),
)
token_logprobs = st.builds(TokenLogprob, uint32, st.floats(-1e9, 0, width=32), st.binary())
logprobs = st.builds(Logprobs, token_logprobs, st.lists(token_logprobs, max_size=3).map(tuple))
layouts = st.builds(KvLayout, uint32, uint32, uint32, st.text())
timings = st.builds(StageTimings, seconds, seconds, seconds, seconds)
peers = st.builds(PrefillPeer, st.text(), st.none() | uint64)
decode_requests = st.builds(
    DecodeRequest, st.text(), tokens, uint32, samplings, st.lists(peers).map(tuple), st.text(),
    uint32, st.text(), st.none() | seconds,
)  # fmt: skip
prefill_requests = st.builds(
    PrefillRequest,
    st.text(),
    tokens,
    uint32,
    st.text(),
    layouts,
    uint64,
    st.text(),
    st.text(min_size=1),
    st.none() | seconds,
)
events: st.SearchStrategy[DecodeEvent] = st.one_of(
    st.builds(Admitted, uint32),
    st.builds(DecodedToken, uint32, uint32, st.none() | logprobs),
    st.builds(Decoded, st.sampled_from(FinishReason), uint32, uint32, timings),
)
step_costs = st.builds(StepCost, *[st.lists(seconds, max_size=4).map(tuple)] * 4)
decode_statuses = st.builds(
    DecodeStatus, worker_id=st.text(), epoch=uint64, kv_identity=st.text(), num_levels=uint32,
    max_rows=uint32, num_waiting=uint32, num_running=st.lists(uint32, max_size=4).map(tuple),
    num_free_pages=uint32, num_pages=uint32, page_size=uint32, step_cost=step_costs,
    prefill_tokens_per_s=seconds, expected_output_tokens=uint32, num_preemptions=uint64,
    num_failed_rows=uint64, num_drafted=uint64, num_accepted=uint64,
    num_attended=st.lists(uint64, max_size=4).map(tuple),
    transfer_cost=st.builds(TransferCost, seconds, seconds),
)  # fmt: skip
prefill_statuses = st.builds(
    PrefillStatus, worker_id=st.text(), epoch=uint64, kv_identity=st.text(), num_running=uint32,
    num_waiting=uint32, num_queued_tokens=uint32, queued_s=seconds, num_free_pages=uint32,
    num_pages=uint32, num_computed_tokens=uint64, num_cached_tokens=uint64,
    cost=st.builds(PrefillCost, seconds, seconds, seconds, uint32),
)  # fmt: skip


@given(samplings)
def test_sampling(sampling: SamplingParams) -> None:
    message = common_pb2.SamplingParams.FromString(
        serde.sampling_to_proto(sampling).SerializeToString()
    )
    assert serde.sampling_from_proto(message, max_tokens=1, seed=0) == sampling


def test_absent_sampling_fields_take_their_defaults() -> None:
    sampling = serde.sampling_from_proto(common_pb2.SamplingParams(), max_tokens=7, seed=9)
    assert sampling == SamplingParams(max_tokens=7, seed=9)


@pytest.mark.parametrize("kind", GrammarKind)
def test_grammars(kind: GrammarKind) -> None:
    grammar = Grammar(kind, "" if kind is GrammarKind.JSON_OBJECT else "{}", "what it is called")
    sampling = SamplingParams(7, seed=9, grammar=grammar)
    message = serde.sampling_to_proto(sampling).SerializeToString()
    read = common_pb2.SamplingParams.FromString(message)
    got = serde.sampling_from_proto(read, max_tokens=1, seed=1)
    assert got == sampling
    assert got.grammar is not None
    assert got.grammar.field == "what it is called"


@pytest.mark.parametrize("grammar", [common_pb2.Grammar(), common_pb2.Grammar(json_object=False)])
def test_a_grammar_without_a_kind_is_refused(grammar: common_pb2.Grammar) -> None:
    message = common_pb2.SamplingParams(grammar=grammar)
    with pytest.raises(InvalidArgument, match="grammar"):
        serde.sampling_from_proto(message, max_tokens=1, seed=1)


def test_a_temperature_of_zero_is_not_absent() -> None:
    message = common_pb2.SamplingParams(temperature=0)
    assert serde.sampling_from_proto(message, max_tokens=1, seed=0).temperature == 0


@pytest.mark.parametrize("reason", FinishReason)
def test_finish_reasons(reason: FinishReason) -> None:
    assert serde.finish_reason_from_proto(serde.finish_reason_to_proto(reason)) is reason


@given(timings)
def test_timings(value: StageTimings) -> None:
    message = serde.timings_to_proto(value).SerializeToString()
    assert serde.timings_from_proto(common_pb2.StageTimings.FromString(message)) == value


@given(layouts)
def test_layouts(layout: KvLayout) -> None:
    message = serde.layout_to_proto(layout).SerializeToString()
    assert serde.layout_from_proto(common_pb2.KvLayout.FromString(message)) == layout


@given(decode_requests)
def test_decode_requests(request: DecodeRequest) -> None:
    message = serde.decode_start_to_proto(request).SerializeToString()
    assert serde.decode_start_from_proto(decode_pb2.DecodeStart.FromString(message)) == request


@given(st.text(), uint32)
def test_level_moves(request_id: str, level: int) -> None:
    move = MoveLevel(request_id, level)
    message = serde.move_level_to_proto(move).SerializeToString()
    assert serde.move_level_from_proto(decode_pb2.MoveLevelRequest.FromString(message)) == move


@given(events)
def test_decode_events(event: DecodeEvent) -> None:
    message = serde.decode_event_to_proto(event).SerializeToString()
    assert serde.decode_event_from_proto(decode_pb2.DecodeEvent.FromString(message)) == event


@given(prefill_requests)
def test_prefill_requests(request: PrefillRequest) -> None:
    message = serde.prefill_request_to_proto(request).SerializeToString()
    assert (
        serde.prefill_request_from_proto(prefill_pb2.PrefillRequest.FromString(message)) == request
    )


@given(decode_statuses)
def test_decode_statuses(status: DecodeStatus) -> None:
    message = serde.decode_status_to_proto(status).SerializeToString()
    assert serde.decode_status_from_proto(decode_pb2.DecodeStatus.FromString(message)) == status


@given(prefill_statuses)
def test_prefill_statuses(status: PrefillStatus) -> None:
    message = serde.prefill_status_to_proto(status).SerializeToString()
    assert serde.prefill_status_from_proto(prefill_pb2.PrefillStatus.FromString(message)) == status


@pytest.mark.parametrize(
    ("given", "field"),
    [({"max_tokens": 1}, "sampling.seed"), ({"seed": 1}, "sampling.max_tokens")],
)
def test_a_start_that_lacks_something_names_it(given: dict[str, Any], field: str) -> None:
    start = decode_pb2.DecodeStart(sampling=common_pb2.SamplingParams(**given))
    with pytest.raises(InvalidArgument) as caught:
        serde.decode_start_from_proto(start)
    assert caught.value.field == field


def test_an_empty_event_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="event"):
        serde.decode_event_from_proto(decode_pb2.DecodeEvent())
