"""Who may import what: the layers of the system, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "colm_serve"

#: A group may import itself and the groups of the lines above its own.
LAYERS = (
    {"proto", "kernels", "errors"},
    {"box", "files", "grammar", "json_file", "yaml_text"},
    {"box_pool", "config", "core"},
    {"kv", "latency"},
    {"model"},
    {"engine", "transport", "training", "convert"},
    {"prefill_worker", "decode_worker", "router"},
    {"client", "cluster", "simulate"},
    {"demo", "measured_costs", "pattern_search"},
    {"cli"},
)
RANK = {group: rank for rank, groups in enumerate(LAYERS) for group in groups}

#: Decisions and book-keeping: plain values in, plain values out, so the simulator can run them.
PURE = (
    "cluster/placement.py",
    "cluster/pulse.py",
    "cluster/scaling.py",
    "config/planner.py",
    "core/costs.py",
    "core/decode_call.py",
    "core/health.py",
    "core/kv_layout.py",
    "core/logprobs.py",
    "core/membership.py",
    "core/prefill_call.py",
    "core/sampling.py",
    "core/status.py",
    "errors.py",
    "grammar.py",
    "engine/speculation.py",
    "latency/bounded_minimum.py",
    "latency/cost_fit.py",
    "latency/prefill_fit.py",
    "latency/rate.py",
    "latency/rls.py",
    "latency/step_fit.py",
    "kv/ledger.py",
    "kv/prefix_cache.py",
    "prefill_worker/job.py",
    "prefill_worker/pages.py",
    "prefill_worker/scheduler.py",
    "decode_worker/codec_choice.py",
    "decode_worker/pages.py",
    "decode_worker/peer_speeds.py",
    "decode_worker/prefill_plan.py",
    "decode_worker/scheduler.py",
    "decode_worker/sequence.py",
    "decode_worker/shipment.py",
    "decode_worker/turn.py",
    "router/admission.py",
    "router/circuit_breaker.py",
    "router/placing/batch.py",
    "router/placing/decision.py",
    "router/demand_meter.py",
    "router/placing/facts.py",
    "router/fair_queue.py",
    "router/placing/latency_model.py",
    "router/placing/lazy.py",
    "router/placing/level_moves.py",
    "router/placing/load.py",
    "router/model_names.py",
    "router/openai/json_size.py",
    "router/openai/level_headers.py",
    "router/placing/offer.py",
    "router/overload.py",
    "router/placing/outlook.py",
    "router/placing/pace.py",
    "router/placing/placement.py",
    "router/planner.py",
    "router/placing/policy.py",
    "router/placing/prefix_index.py",
    "router/retry_budget.py",
    "router/sizes.py",
    "router/placing/room.py",
    "router/placing/snapshot.py",
    "router/tenants.py",
    "router/token_bucket.py",
    "router/placing/worker_record.py",
)
IMPURE = {"torch", "grpc", "ray", "time", "datetime", "asyncio", "threading", "random", "numpy"}


@dataclass(frozen=True)
class Source:
    """One module, named by its path inside the package."""

    name: str
    tree: ast.Module

    @property
    def group(self) -> str:
        return self.name.split("/")[0].removesuffix(".py")

    @property
    def imports(self) -> Iterator[str]:
        """Every imported module, at whatever depth of the code."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module is not None
                yield node.module
                # `from colm_serve.transport import serde` imports a module too.
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    @property
    def packages(self) -> set[str]:
        return {name.split(".")[0] for name in self.imports}


def read_sources() -> list[Source]:
    """The package's modules; the rooms are symlinked into it. Generated stubs are left out."""
    sources = []
    for path in sorted(PACKAGE.glob("*.py")) + sorted(PACKAGE.glob("*/**/*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("proto/") and name != "__init__.py":
            sources.append(Source(name, ast.parse(path.read_text("utf-8"), name)))
    return sources


SOURCES = read_sources()


def of_ours(source: Source) -> set[str]:
    """The groups of this package that a module imports from."""
    parts = (name.split(".") for name in source.imports)
    return {part[1] for part in parts if part[0] == "colm_serve" and len(part) > 1}


def test_the_whole_system_is_looked_at() -> None:
    groups = {source.group for source in SOURCES}
    assert groups <= set(RANK), "a module that no layer is given for"
    assert {"kernels", "prefill_worker", "decode_worker", "router", "kv", "engine"} <= groups


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_layer_imports_only_lower_ones(source: Source) -> None:
    for group in of_ours(source) - {source.group}:
        assert RANK[group] < RANK[source.group], f"{source.name} imports {group}"


@pytest.mark.parametrize("package", ["config", "core"])
def test_what_is_shared_is_imported_by_one_name(package: str) -> None:
    parts = {
        f"colm_serve.{source.name.removesuffix('.py').replace('/', '.')}"
        for source in SOURCES
        if source.group == package
    }
    for source in SOURCES:
        assert source.group == package or not parts & set(source.imports), source.name


def test_the_workers_and_the_router_do_not_know_each_other() -> None:
    rooms = {"prefill_worker", "decode_worker", "router"}
    for source in SOURCES:
        if source.group in rooms:
            assert not of_ours(source) & (rooms - {source.group}), source.name


def test_only_the_wire_imports_grpc() -> None:
    allowed = {
        "client.py",
        "prefill_worker/service.py",
        "decode_worker/service.py",
        "decode_worker/prompt_kv.py",
        "router/service.py",
        "router/server.py",
        "router/worker_client.py",
    }
    users = {s.name for s in SOURCES if {p for p in s.packages if p.startswith("grpc")}}
    assert {name for name in users if not name.startswith("transport/")} <= allowed


def test_only_the_cluster_imports_ray() -> None:
    users = {source.name for source in SOURCES if "ray" in source.packages}
    assert all(name.endswith("/actor.py") or name.startswith("cluster/") for name in users)
    assert users, "Ray places the processes"


@pytest.mark.parametrize("name", PURE)
def test_decisions_import_nothing_that_acts(name: str) -> None:
    source = next(source for source in SOURCES if source.name == name)
    assert not source.packages & IMPURE


def test_every_scheduler_and_policy_is_held_to_that() -> None:
    kinds = {"scheduler", "policy", "ledger", "planner", "admission", "latency_model"}
    assert {source.name for source in SOURCES if Path(source.name).stem in kinds} <= set(PURE)


def test_protobuf_messages_stay_at_the_edge() -> None:
    allowed = {
        "client.py", "decode_worker/prompt_kv.py", "decode_worker/service.py",
        "prefill_worker/service.py", "router/serde.py", "router/server.py",
        "router/service.py", "router/worker_client.py",
    }  # fmt: skip
    users = {source.name for source in SOURCES if "proto" in of_ours(source)}
    assert {name for name in users if not name.startswith("transport/")} <= allowed


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_imports_stand_at_the_top_and_are_absolute(source: Source) -> None:
    for node in ast.walk(source.tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "a relative import"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            # Kernels are chosen in one place; what grammars, LoRA, parquet files, Hugging Face
            # datasets and several processes need is heavy, and few ask.
            lazy = (
                "kernels/dispatch.py",
                "engine/grammar_backend.py",
                "simulate/report.py",
                "training/data_parallel.py",
                "training/lora.py",
                "training/rows.py",
                "training/streamed_corpus.py",
            )
            assert not inner or source.name in lazy, f"line {inner[0].lineno}"


def test_no_command_waits_for_imports_that_few_need() -> None:
    heavy = {
        "datasets", "matplotlib", "peft", "pyarrow", "torch.distributed.fsdp",
        "torch.distributed.tensor", "transformers",
    }  # fmt: skip
    for source in SOURCES:
        top = Source(source.name, ast.Module([n for n in source.tree.body if _is_import(n)], []))
        slow = {name for name in top.imports if any(_is_in(name, package) for package in heavy)}
        assert not slow or source.name in ("training/fully_sharded.py", "simulate/plots.py")
        assert "colm_serve.training.fully_sharded" not in top.imports, source.name
        assert "colm_serve.simulate.plots" not in top.imports, source.name


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    """A pickle from a wire or a model folder is somebody else's program."""
    banned = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for source in SOURCES:
        assert not source.packages & banned, source.name
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {
                    "torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load",
                    "__import__", "importlib.import_module",
                }, f"{source.name}:{node.lineno} calls {called}"  # fmt: skip
