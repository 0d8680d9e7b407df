"""Traces: what is drawn, what is read, and what is said of what cannot be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from colm_serve.errors import InvalidArgument, InvalidConfig
from colm_serve.simulate.mooncake import MooncakeTrace
from colm_serve.simulate.synthetic import SyntheticTrace
from colm_serve.simulate.trace import Block

EXAMPLES = sorted((Path(__file__).parents[2] / "cluster_configs" / "traces").glob("*.yaml"))
LINE = {"timestamp": 500, "input_length": 600, "output_length": 7, "hash_ids": [3, 9]}


def synthetic(**keys: Any) -> SyntheticTrace:
    return SyntheticTrace.model_validate({"num_requests": 4000, **keys})


@pytest.mark.parametrize(
    "arrivals",
    [
        {"kind": "poisson"},
        {"kind": "bursty", "burst_s": 0.2, "calm_s": 0.8},
        {"kind": "diurnal", "period_s": 10},
    ],
    ids=lambda arrivals: arrivals["kind"],
)
def test_the_mean_rate_is_the_one_given(arrivals: dict[str, Any]) -> None:
    requests = list(synthetic(arrivals={"rate_per_s": 20, **arrivals}).requests())
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(20, rel=0.1)


def variation(arrivals: dict[str, Any]) -> float:
    """Variance over mean of the arrivals a second: 1 for a Poisson process."""
    trace = synthetic(arrivals={"rate_per_s": 20, **arrivals})
    counts = Counter(int(request.arrival_s) for request in trace.requests())
    values = [counts[second] for second in range(max(counts))]
    return mean((value - mean(values)) ** 2 for value in values) / mean(values)


def test_bursts_are_bursts() -> None:
    assert variation({"kind": "poisson"}) == pytest.approx(1, rel=0.3)
    assert variation({"kind": "bursty", "burst_ratio": 8, "burst_s": 3, "calm_s": 9}) > 4


def test_days_have_their_peak() -> None:
    arrivals = {"kind": "diurnal", "rate_per_s": 20, "period_s": 40, "amplitude": 0.9}
    phases = [request.arrival_s % 40 for request in synthetic(arrivals=arrivals).requests()]
    assert sum(phase < 20 for phase in phases) > 3 * sum(phase >= 20 for phase in phases)


def test_a_seed_is_a_trace() -> None:
    keys = {"conversations": {"mean_turns": 3, "num_shared_prefixes": 4}}
    assert list(synthetic(**keys).requests()) == list(synthetic(**keys).requests())
    assert list(synthetic(**keys).requests()) != list(synthetic(**keys, seed=1).requests())


def test_turns_hold_what_was_said_before() -> None:
    trace = synthetic(
        arrivals={"kind": "poisson", "rate_per_s": 5},
        conversations={"mean_turns": 4, "num_shared_prefixes": 2, "shared_prefix_tokens": 64},
    )
    requests = list(trace.requests())
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    assert 4000 / requests[-1].arrival_s == pytest.approx(5, rel=0.2)
    by_message = {request.blocks[-1]: request for request in requests}
    num_later = 0
    for request in requests:
        assert request.blocks[0].block_id in (0, 1)
        if len(request.blocks) > 2:
            before = by_message[request.blocks[-3]]
            output = Block(before.output_id or 0, before.num_output_tokens)
            assert request.blocks[:-1] == (*before.blocks, output)
            num_later += 1
    assert num_later / 4000 == pytest.approx(3 / 4, abs=0.05)


def test_lengths_and_classes_are_those_asked_for() -> None:
    trace = synthetic(
        kinds=[
            {"weight": 3, "sla_class": "a", "prompt": {"mean": 200, "max": 1000}},
            {"weight": 1, "sla_class": "b", "output": {"mean": 50, "spread": 0}},
        ]
    )
    by_class = {name: [r for r in trace.requests() if r.sla_class == name] for name in "ab"}
    assert len(by_class["a"]) / 4000 == pytest.approx(0.75, abs=0.03)
    assert mean(r.num_prompt_tokens for r in by_class["a"]) == pytest.approx(200, rel=0.05)
    assert {r.num_output_tokens for r in by_class["b"]} == {50}


def test_prompts_are_alike_as_far_as_their_blocks_are() -> None:
    first, second = list(synthetic(num_requests=2).requests())
    assert len(first.prompt()) == first.num_prompt_tokens
    assert set(first.prompt()).isdisjoint(second.prompt())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_requests": 0}, "num_requests"),
        ({"seed": -1}, "seed"),
        ({"rate": 3}, "rate"),
        ({"arrivals": {"kind": "bursty", "rate_per_s": 0}}, "rate_per_s"),
        ({"arrivals": {"kind": "flat", "rate_per_s": 1}}, "arrivals"),
        ({"kinds": []}, "kinds"),
        ({"kinds": [{"prompt": {"mean": 50, "max": 10}}]}, "above max 10"),
        ({"conversations": {"mean_turns": 0.5}}, "mean_turns"),
    ],
)
def test_a_bad_description_names_the_key(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.yaml"
    path.write_text(json.dumps({"num_requests": 5, **keys}))
    with pytest.raises(InvalidConfig, match=named):
        SyntheticTrace.load(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_trace(path: Path) -> None:
    trace = SyntheticTrace.load(path)
    assert len(list(trace.requests())) == trace.num_requests


def read(tmp_path: Path, *lines: str) -> list[Any]:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return list(MooncakeTrace(path).requests())


def test_mooncakes_lines_are_read(tmp_path: Path) -> None:
    later = json.dumps({**LINE, "timestamp": 1500, "hash_ids": [3, 11]})
    first, second = read(tmp_path, json.dumps(LINE), later)
    assert (first.arrival_s, second.arrival_s) == (0.5, 1.5)
    assert first.blocks == (Block(3, 512), Block(9, 88))
    assert first.num_output_tokens == 7
    assert second.blocks[0] == first.blocks[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"timestamp": None}, "timestamp: None"),
        ({"timestamp": 100}, "at least the 500"),
        ({"timestamp": "1"}, "timestamp: '1'"),
        ({"input_length": 0}, "input_length: 0"),
        ({"input_length": 600.5}, "input_length: 600.5"),
        ({"output_length": True}, "output_length: True"),
        ({"hash_ids": 4}, "hash_ids: 4"),
        ({"hash_ids": [1, "x"]}, "hash_ids: "),
        ({"hash_ids": [1]}, "hash_ids: '1 ids' is not allowed; allowed: 2"),
    ],
)
def test_a_bad_line_is_named_with_its_field(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path, json.dumps(LINE), json.dumps({**LINE, **change}))
    assert "trace.jsonl, line 2" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "a JSON object"),
        ("[]", "a JSON object of timestamp"),
        ('{"timestamp": 1}', "input_length: None is not allowed; allowed: a value"),
    ],
)
def test_a_line_of_another_kind_is_named(line: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path, line)
    assert "line 1" in str(caught.value)
    assert named in str(caught.value)
