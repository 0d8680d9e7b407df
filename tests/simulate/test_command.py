"""`colm simulate` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from colm_serve.cli import app
from colm_serve.errors import ColmError
from tests.simulate.clusters import COSTS

RUNNER = CliRunner(env={"COLUMNS": "120"})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"model": "nowhere", "decode": {"count": 2}}))
    COSTS.save(tmp_path / "costs.json")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.yaml"
    path.write_text(yaml.safe_dump({"num_requests": 30}))
    return path


def test_a_synthetic_trace_gives_a_table_and_files(
    config: Path, trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = RUNNER.invoke(
        app, ["simulate", str(config), str(trace), "--decode", "3", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    for expected in ("4 workers", "TTFT p50", "within their SLA", "goodput", "mean level"):
        assert expected in result.output
    outcome = json.loads((out / "outcome.json").read_text())
    assert outcome["total"]["num_requests"] == 30
    assert outcome["total"]["attainment"] == 1.0


def test_a_mooncake_trace_is_played(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 5, "input_length": 700, "output_length": 9, "hash_ids": [0, 1]}
    path.write_text(f"{json.dumps(line)}\n")
    result = RUNNER.invoke(app, ["simulate", str(config), str(path)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "best"], "policy: 'best'"),
        (["--decode", "0"], "number of decode workers: 0"),
        (["--costs", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], named: str, config: Path, trace: Path
) -> None:
    result = RUNNER.invoke(app, ["simulate", str(config), str(trace), *arguments])
    assert isinstance(result.exception, ColmError)
    assert named in str(result.exception)


def test_a_trace_of_an_unknown_kind_is_named(config: Path, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["simulate", str(config), str(tmp_path / "trace.csv")])
    assert isinstance(result.exception, ColmError)
    assert "a .jsonl file, or .yaml" in str(result.exception)


def test_equal_runs_write_equal_plots(config: Path, trace: Path, tmp_path: Path) -> None:
    plots = []
    for out in (tmp_path / "once", tmp_path / "again"):
        RUNNER.invoke(app, ["simulate", str(config), str(trace), "--out", str(out)])
        plots.append({path.name: path.read_text() for path in out.glob("*.svg")})
    assert plots[0] == plots[1]
    assert set(plots[0]) == {"latencies.svg", "levels.svg"}
    assert "time to first token (ms)" in plots[0]["latencies.svg"]
    assert "chain level" in plots[0]["levels.svg"]


def test_without_matplotlib_only_the_plots_are_missing(
    config: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli.simulation", "simulate.report"):
        monkeypatch.setattr(f"colm_serve.{module}.HAS_MATPLOTLIB", False)
    out = tmp_path / "out"
    result = RUNNER.invoke(app, ["simulate", str(config), str(trace), "--out", str(out)])
    assert "matplotlib is not installed" in result.output
    assert [path.name for path in out.iterdir()] == ["outcome.json"]
