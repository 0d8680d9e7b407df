"""What a decode worker's own steps tell of their cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from colm_serve.core import StepCost
from colm_serve.decode_worker.step_meter import MAX_PENDING, StepMeter
from tests.helpers import GREEDY, decode_service, make_prompt, prefill_service
from tests.worker_clients import decode_client

MEASURED = StepCost((0.004, 0.002, 0.003), (0.0002, 0.0001, 0.0001))


def test_a_meter_keeps_the_first_steps_until_it_is_asked() -> None:
    meter = StepMeter(MEASURED)
    expected = 2 * MEASURED.step_s((2, 1, 1))
    for _ in range(MAX_PENDING):
        meter.note([(3, 10), (1, 10)], expected)
    for _ in range(1000):
        meter.note([(3, 10), (1, 10)], 1000.0)
    cost = meter.cost()
    assert cost.step_s((2, 1, 1)) == pytest.approx(expected, rel=0.02)
    assert meter.cost() == cost, "there is nothing new"


async def test_a_status_follows_what_a_worker_does(folder: Path) -> None:
    """Blocks that sleep make steps and passes slower than they were measured at the start.

    Each sleeps for as long as all of them took then, which may be long on a busy machine.
    """
    step_pause_s = pass_pause_s = 0.0

    with (
        prefill_service(folder, before_block=lambda: time.sleep(pass_pause_s)) as (
            prefill,
            prefill_worker,
        ),
        decode_service(folder, before_block=lambda: time.sleep(step_pause_s)) as (service, worker),
    ):
        first_step_s = worker.status().step_cost.step_s((1, 1, 1))
        first_passes_s = prefill_worker.status().cost.seconds(0, 200)
        step_pause_s, pass_pause_s = max(0.002, first_step_s), max(0.002, first_passes_s)
        async with decode_client(service.address, worker.kv_identity) as client:
            for seed in range(3):
                prompt = make_prompt(200, seed=seed)
                await client.generate(prompt, 3, GREEDY, (prefill.address,))
                status = await client.status()
            now_pass = prefill_worker.status()
    assert status.step_cost.step_s((1, 1, 1)) > first_step_s + step_pause_s / 2
    assert status.transfer_cost.call_s > 0
    assert now_pass.cost.seconds(0, 200) > first_passes_s + pass_pause_s / 2
    assert now_pass.queued_s == 0


def test_steps_that_a_fit_has_slowed_down_do_not_count() -> None:
    meter = StepMeter(MEASURED)
    slow = 100 * MEASURED.step_s((1, 1, 1))
    with meter._fitting:
        meter.note([(3, 10)], slow)
    meter.note([(3, 10)], slow)  # it had begun when the fit ended
    assert meter.cost() == StepMeter(MEASURED).cost()
    meter.note([(3, 10)], slow)
    assert meter.cost() != StepMeter(MEASURED).cost()
