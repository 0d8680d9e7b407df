from __future__ import annotations

import pytest

from colm_serve.errors import ResourceExhausted
from colm_serve.router.admission import Admission
from colm_serve.router.lifecycle import Lifecycle, Stage


def test_admission_is_bounded_and_places_come_back() -> None:
    admission = Admission(2)
    with admission.admit(), admission.admit():
        assert admission.num_running == 2
        with pytest.raises(ResourceExhausted, match="2 requests are under way"), admission.admit():
            pass
    with pytest.raises(KeyError), admission.admit():
        raise KeyError
    assert admission.num_running == 0


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stages_keep_the_time_they_were_first_reached() -> None:
    clock = FakeClock()
    lifecycle = Lifecycle(clock)
    clock.now += 1
    lifecycle.reach(Stage.PLACED)
    clock.now += 1
    lifecycle.reach(Stage.PLACED)
    assert lifecycle.between_s(Stage.RECEIVED, Stage.PLACED) == 1
    assert lifecycle.between_s(Stage.RECEIVED, Stage.FINISHED) is None
    assert lifecycle.age_s() == 2
    assert lifecycle.has(Stage.PLACED)
    assert not lifecycle.has(Stage.ADMITTED)


def test_gaps_between_tokens() -> None:
    clock = FakeClock()
    lifecycle = Lifecycle(clock)
    clock.now += 3
    lifecycle.token()
    assert lifecycle.token_gap_s is None
    clock.now += 0.5
    lifecycle.token()
    assert lifecycle.token_gap_s == 0.5
    assert lifecycle.between_s(Stage.RECEIVED, Stage.FIRST_TOKEN) == 3
