"""Keeps requests from workers that answer polls but fail requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from colm_serve.core import Member

#: The longest that a worker is left alone between two probes.
MAX_OPEN_S = 60.0


@dataclass
class _Circuit:
    num_failures: int = 0  # in a row
    num_openings: int = 0  # in a row
    open_until: float | None = None
    is_probed: bool = False


class CircuitBreakers:
    """One circuit a worker: closed, open after `max_failures` in a row, half-open after a while.

    A half-open circuit lets one request through as a probe: its success closes the circuit, its
    failure opens it for twice as long as before. A probe of which nothing is heard for `open_s`
    is followed by another. Times are seconds on any clock that never goes back.
    """

    def __init__(self, max_failures: int, open_s: float) -> None:
        self._max_failures = max_failures
        self._open_s = open_s
        self._circuits: dict[Member, _Circuit] = {}

    def allows(self, member: Member, now: float) -> bool:
        """Whether a request may go there now, be it as a probe."""
        circuit = self._circuits.get(member)
        return circuit is None or circuit.open_until is None or now >= circuit.open_until

    def begin(self, member: Member, now: float) -> None:
        """A request goes there."""
        circuit = self._circuits.get(member)
        if circuit is not None and circuit.open_until is not None:
            circuit.is_probed = True
            circuit.open_until = now + self._open_s

    def succeeded(self, member: Member) -> None:
        """A request came to its end there."""
        self._circuits.pop(member, None)

    def failed(self, member: Member, now: float) -> bool:
        """A request broke off there; returns whether that has opened the circuit."""
        circuit = self._circuits.setdefault(member, _Circuit())
        circuit.num_failures += 1
        if circuit.open_until is not None:
            # One that ran there when the circuit opened tells nothing new; the probe does.
            if not circuit.is_probed:
                return False
        elif circuit.num_failures < self._max_failures:
            return False
        circuit.open_until = now + min(MAX_OPEN_S, self._open_s * 2.0**circuit.num_openings)
        circuit.num_openings = min(circuit.num_openings + 1, 32)
        circuit.is_probed = False
        return True

    def keep(self, members: Iterable[Member]) -> None:
        """Forget all others: the workers that have left."""
        known = set(members)
        self._circuits = {m: c for m, c in self._circuits.items() if m in known}

    def open_ones(self) -> frozenset[Member]:
        """The workers whose circuit is open or half-open."""
        return frozenset(m for m, c in self._circuits.items() if c.open_until is not None)
