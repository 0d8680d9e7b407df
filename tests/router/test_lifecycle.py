from __future__ import annotations

from colm_serve.router.lifecycle import Lifecycle, Stage
from tests.router.clock import FakeClock


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
