"""What Ray says of an actor that failed becomes one line."""

from __future__ import annotations

import traceback

import pytest
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from colm_serve.cluster.actors import reason
from colm_serve.cluster.placement import Role, Slot
from colm_serve.errors import CheckpointError

DAMAGED = "model/chain-2.safetensors: damaged"


def raised_by_an_actor() -> RayTaskError:
    try:
        raise CheckpointError(DAMAGED)
    except CheckpointError as error:
        return RayTaskError("DecodeActor.__init__", traceback.format_exc(), error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised_by_an_actor(), DAMAGED),
        (
            ActorDiedError(raised_by_an_actor()),
            f"decode-0: colm_serve.errors.CheckpointError: {DAMAGED}",
        ),
        (ActorDiedError(), "decode-0: The actor died unexpectedly before finishing this task."),
    ],
)
def test_the_reason_of_a_failure_is_a_line(error: RayError, expected: str) -> None:
    slot = Slot(Role.DECODE, index=0, bundle=0, num_cpus=1, num_gpus=0, num_threads=1)
    assert str(reason(slot, error)) == expected
