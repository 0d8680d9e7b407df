"""Virtual time runs in order, whenever its events are set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colm_serve.simulate.clock import VirtualClock

#: Within a slot of the calendar and far beyond; the delays are those of what an event sets.
TIMES = st.sampled_from([0.0, 0.0001, 0.0004, 0.001, 0.0015, 3.0, 1e6])


@given(events=st.lists(st.tuples(TIMES, st.lists(TIMES, max_size=3)), max_size=12))
def test_events_run_in_order_of_time_and_of_one_time_as_they_were_set(
    events: list[tuple[float, list[float]]],
) -> None:
    clock = VirtualClock()
    expected: list[tuple[float, int]] = []
    run: list[tuple[float, int]] = []

    def set_event(time: float, delays: list[float]) -> None:
        expected.append((time, len(expected)))
        clock.at(time, happen, expected[-1], delays)

    def happen(event: tuple[float, int], delays: list[float]) -> None:
        assert clock.now == event[0]
        run.append(event)
        for delay_s in delays:
            set_event(clock.now + delay_s, [])

    for time, delays in events:
        set_event(time, delays)
    clock.run()
    assert run == sorted(expected)
    assert not clock.step()
