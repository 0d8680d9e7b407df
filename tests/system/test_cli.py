"""The command line with the bundled model, as a newcomer types it; nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models" / "stdlib-air"
TIMEOUT_S = 100
SERVE_MARK = uuid.uuid4().hex


def colm(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from colm_serve.cli import main; main()", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        colm(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def marked(mark: str) -> list[psutil.Process]:
    """Live processes that inherited `mark` in their environment: a command's whole family."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.environ().get("COLM_TEST_MARK") == mark:
                found.append(process)
    return found


def start(mark: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        colm(*arguments), stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "COLUMNS": "200", "COLM_TEST_MARK": mark},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`colm serve` in a session of its own, and its gRPC address."""
    process = start(SERVE_MARK, "serve", "cluster_configs/demo.yaml")
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if line.strip().startswith("gRPC"):
            address = line.split()[1]
        if "Ctrl-C" in line:
            break
    yield process, address
    if process.poll() is None:
        process.kill()
        process.wait(TIMEOUT_S)


def test_generate_prints_text_and_usage(server: tuple[subprocess.Popen[str], str]) -> None:
    result = run(
        "generate", "import os\n", "--address", server[1], "--max-tokens", "8", "--level", "2"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "8 made" in result.stderr or "stop" in result.stderr


def test_status_lists_every_worker(server: tuple[subprocess.Popen[str], str]) -> None:
    result = run("status", "--address", server[1])
    assert result.returncode == 0, result.stderr
    for worker in ("prefill-0", "prefill-1", "decode-0"):
        assert worker in result.stdout


def test_an_error_of_ours_is_a_line_and_status_2(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    result = run("generate", "x", "--address", server[1], "--level", "9")
    assert result.returncode == 2
    assert "level" in result.stderr
    assert "1 to 4" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_ctrl_c_stops_everything(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    assert len(marked(SERVE_MARK)) > 5, "Ray and its actors should be running"
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0
    _, alive = psutil.wait_procs(marked(SERVE_MARK), 10)
    assert not alive


def test_demo_prints_its_tables_and_leaves_nothing() -> None:
    mark = uuid.uuid4().hex
    process = start(mark, "demo")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    for expected in ("held-out loss", "moved between levels", "dense, full width", "chain 1"):
        assert expected in output
    _, alive = psutil.wait_procs(marked(mark), 10)
    assert not alive


def test_a_searched_pattern_file_is_one_that_a_cluster_takes(tmp_path: Path) -> None:
    patterns = tmp_path / "patterns.json"
    result = run("search-patterns", str(BUNDLED), "--out", str(patterns), "--tokens", "256")
    assert result.returncode == 0, result.stderr
    assert "attention mass kept" in result.stdout
    config = tmp_path / "cluster.yaml"
    sparse = {"selector": "minference", "pattern_file": "patterns.json"}
    config.write_text(yaml.safe_dump({"model": str(BUNDLED), "prefill": {"sparse": sparse}}))
    mark = uuid.uuid4().hex
    process = start(mark, "serve", str(config))
    assert process.stdout is not None
    assert any("Ctrl-C" in line for line in process.stdout), "it did not come to serve"
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0
    patterns.write_text("[]")
    result = run("serve", str(config))
    assert result.returncode == 2
    assert "a list of 4, an object per layer" in result.stderr


def test_a_bad_config_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump({"model": str(BUNDLED), "decode": {"max_rows": 0}}))
    result = run("serve", str(config))
    assert result.returncode == 2
    assert "decode.max_rows" in result.stderr


def test_a_damaged_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in BUNDLED.iterdir():
        if path.name != "chain-3.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump({"model": str(folder)}))
    result = run("serve", str(config))
    assert result.returncode == 2
    assert "chain-3.safetensors" in result.stderr
