"""Work of one sequence that failed alone, in the midst of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from colm_serve.errors import ColmError, RowFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """Why a sequence cannot go on, which says nothing of the others in its batch.

    `is_of_model`: the model's own scores were no numbers, before any rule of the request changed
    them. Then its keys and values are not to be trusted either, and perhaps the model is not.
    """

    error: ColmError
    is_of_model: bool = False


def attempt(work: Callable[[], T]) -> T | Failed:
    """What one sequence's own work gives; whatever is raised there is a failure of it alone."""
    try:
        return work()
    except ColmError as error:
        return Failed(error)
    except Exception as error:  # noqa: BLE001 - it is told as the cause of what is returned
        failure = RowFailed(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return Failed(failure)
