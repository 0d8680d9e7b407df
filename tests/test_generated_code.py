"""The committed stubs are what the protos generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "colm_serve" / "proto"


def test_committed_stubs_equal_fresh_ones(tmp_path: Path) -> None:
    """The flags are those of `make proto`."""
    protos = sorted((ROOT / "proto").glob("colm/v1/*.proto"))
    names = [f"colm_serve/proto/{path.relative_to(ROOT / 'proto').as_posix()}" for path in protos]
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-Icolm_serve/proto={ROOT / 'proto'}",
            f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
            *names,
        ],
        check=True,
        timeout=100,
    )  # fmt: skip
    fresh_root = tmp_path / "colm_serve" / "proto"
    fresh = {p.relative_to(fresh_root): p.read_bytes() for p in fresh_root.rglob("*.py*")}
    committed = {
        p.relative_to(COMMITTED): p.read_bytes()
        for p in COMMITTED.rglob("*_pb2*.py*")
        if p.suffix in (".py", ".pyi")
    }
    assert len(protos) > 0
    assert sorted(fresh) == sorted(committed), "run `make proto`"
    for name, content in fresh.items():
        assert committed[name] == content, f"{name} differs from its proto: run `make proto`"
