"""What `colm simulate` does: files in, an outcome out."""

from __future__ import annotations

import re
from pathlib import Path

from colm_serve.config import ClusterConfig, RouterConfig
from colm_serve.errors import InvalidArgument, InvalidConfig
from colm_serve.simulate.costs import WorkerCosts
from colm_serve.simulate.mooncake import MooncakeTrace
from colm_serve.simulate.outcomes import Outcome
from colm_serve.simulate.simulation import Simulation
from colm_serve.simulate.synthetic import SyntheticTrace
from colm_serve.simulate.trace import Trace

#: Measured costs lie beside the cluster's YAML.
COSTS_NAME = "costs.json"


def load_trace(path: Path, seed: int | None = None) -> Trace:
    """A Mooncake trace (.jsonl) or the description of a synthetic one (.yaml).

    Raises:
        InvalidConfig: neither, not readable, or a description that is not allowed.
    """
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise InvalidConfig("trace", str(path), "a readable file")
        return MooncakeTrace(path)
    if path.suffix not in (".yaml", ".yml"):
        raise InvalidConfig("trace", str(path), "a .jsonl file, or .yaml for a synthetic trace")
    trace = SyntheticTrace.load(path)
    return trace if seed is None else trace.model_copy(update={"seed": seed})


def with_policy(config: ClusterConfig, name: str) -> ClusterConfig:
    """The config with the policy `name`: adaptive, aggregated or level-1, level-2 and so on.

    Raises:
        InvalidArgument: there is none of this name.
    """
    if name in ("adaptive", "aggregated"):
        update: dict[str, object] = {"policy": name, "fixed_level": None}
    elif re.fullmatch("level-[1-9][0-9]*", name):
        level = int(name.removeprefix("level-"))
        update = {"policy": "fixed_level", "fixed_level": level, "level_moves_per_s": 0.0}
    else:
        raise InvalidArgument("policy", name, "adaptive, aggregated, level-1, level-2, ...")
    router = RouterConfig.model_validate({**config.router.model_dump(), **update})
    return config.model_copy(update={"router": router})


def run_simulation(
    config_path: Path,
    trace_path: Path,
    *,
    costs_path: Path | None = None,
    policy: str | None = None,
    num_prefill: int | None = None,
    num_decode: int | None = None,
    seed: int | None = None,
) -> Outcome:
    """Play a trace against the cluster of a config, with other worker counts if given.

    Raises:
        InvalidConfig, InvalidArgument: a file, a line of the trace or a name is wrong.
    """
    config = with_counts(ClusterConfig.load(config_path), num_prefill, num_decode)
    if policy is not None:
        config = with_policy(config, policy)
    costs = WorkerCosts.load(costs_path or config_path.parent / COSTS_NAME)
    trace = load_trace(trace_path, seed)
    return Simulation(config, costs).run(trace)


def with_counts(
    config: ClusterConfig, num_prefill: int | None, num_decode: int | None
) -> ClusterConfig:
    """The config with these numbers of workers, where they are given."""
    rooms = {"prefill": num_prefill, "decode": num_decode}
    for room, count in rooms.items():
        if count is not None and count < 1:
            raise InvalidArgument(f"number of {room} workers", count, "1 or more")
    return config.model_copy(
        update={
            room: getattr(config, room).model_copy(update={"count": count})
            for room, count in rooms.items()
            if count is not None
        }
    )
