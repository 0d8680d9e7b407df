from __future__ import annotations

import pytest

from colm_serve.cluster.placement import Role, Slot, max_cpus, slots_of
from colm_serve.cluster.scaling import scaling_of
from colm_serve.config import ClusterConfig
from colm_serve.router.planner import Plan


def slots(role: Role, num: int) -> list[Slot]:
    return [Slot(role, i, i, num_cpus=1.0, num_gpus=0.0, num_threads=1) for i in range(num)]


@pytest.mark.parametrize(
    ("now", "then", "converted", "added", "removed"),
    [
        ((2, 2), (2, 2), [], [], []),
        ((2, 1), (3, 3), [], ["prefill", "decode", "decode"], []),
        ((3, 3), (1, 2), [], [], ["prefill-1", "prefill-2", "decode-2"]),
        ((3, 1), (2, 2), ["prefill-2"], [], []),
        ((4, 1), (1, 2), ["prefill-3"], [], ["prefill-1", "prefill-2"]),
        ((3, 1), (2, 4), ["prefill-2"], ["decode", "decode"], []),
        # A decode worker does not become a prefill worker: a fresh one holds less.
        ((1, 3), (2, 2), [], ["prefill"], ["decode-2"]),
    ],
)
def test_scaling(
    now: tuple[int, int],
    then: tuple[int, int],
    converted: list[str],
    added: list[str],
    removed: list[str],
) -> None:
    plan = Plan(*then, level_share=(), reason="")
    scaling = scaling_of(plan, slots(Role.PREFILL, now[0]), slots(Role.DECODE, now[1]))
    assert [slot.worker_id for slot in scaling.converted] == converted
    assert [role.value for role in scaling.added] == added
    assert [slot.worker_id for slot in scaling.removed] == removed
    assert scaling.is_change is (now != then)


@pytest.mark.parametrize(
    ("planner", "expected"),
    [({}, 8), ({"enabled": True, "max_prefill": 4, "max_decode": 3}, 8 + 4 * 2 + 3 * 3)],
)
def test_ray_is_given_places_enough_for_any_plan(
    planner: dict[str, object], expected: float
) -> None:
    config = ClusterConfig.model_validate(
        {
            "model": "m",
            "prefill": {"count": 2, "num_cpus": 2},
            "decode": {"num_cpus": 3},
            "planner": planner,
        }
    )
    assert max_cpus(config) == expected
    assert [s.worker_id for s in slots_of(config)] == [
        "router-0", "prefill-0", "prefill-1", "decode-0",
    ]  # fmt: skip


def test_each_variant_has_decode_workers_of_its_own() -> None:
    config = ClusterConfig.model_validate(
        {"model": "m", "decode": {"count": 2}, "variants": {"chat": "a", "code": "b"}}
    )
    slots = {slot.worker_id: slot.variant for slot in slots_of(config)}
    assert slots == {
        "router-0": "", "prefill-0": "", "decode-0": "", "decode-1": "",
        "decode-2": "chat", "decode-3": "chat", "decode-4": "code", "decode-5": "code",
    }  # fmt: skip
    assert max_cpus(config) == 8
