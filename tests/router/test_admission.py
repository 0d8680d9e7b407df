from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm_serve.config import TenantConfig
from colm_serve.errors import InvalidArgument, RateLimited, ResourceExhausted
from colm_serve.router.admission import Admission, Ticket
from colm_serve.router.tenants import ANYBODY, Tenant
from tests.router.clock import FakeClock


def admission(clock: FakeClock, *tenants: Tenant, max_under_way: int = 100) -> Admission:
    return Admission(max_under_way, tenants or (ANYBODY,), clock)


def tenant(name: str = "acme", **limits: int) -> Tenant:
    return Tenant(name, TenantConfig(**limits))  # type: ignore[arg-type]


def test_all_together_are_bounded_and_places_come_back() -> None:
    door = admission(FakeClock(), max_under_way=2)
    with door.admit(ANYBODY), door.admit(ANYBODY):
        assert door.num_running == 2
        with pytest.raises(ResourceExhausted, match="2 requests are under way"):
            door.admit(ANYBODY).__enter__()
    with pytest.raises(KeyError), door.admit(ANYBODY):
        raise KeyError
    assert door.num_running == 0


def test_a_tenant_has_so_many_requests_at_a_time() -> None:
    one, other = tenant(max_concurrent=1), tenant("other")
    door = admission(FakeClock(), one, other)
    with door.admit(one):
        with pytest.raises(RateLimited, match=r"max_concurrent: 1 .* 'acme'.*allowed: 1"):
            door.admit(one).__enter__()
        with door.admit(other):
            pass
    with door.admit(one):
        pass


def test_a_tenant_has_so_many_requests_a_minute() -> None:
    clock, acme = FakeClock(), tenant(requests_per_min=2)
    door = admission(clock, acme)
    for _ in range(2):
        with door.admit(acme):
            pass
    with pytest.raises(RateLimited, match=r"requests_per_min: .*'acme' has used its 2") as error:
        door.admit(acme).__enter__()
    assert error.value.retry_after_s == 30
    clock.now += 30
    with door.admit(acme):
        pass


def test_tokens_are_reserved_and_what_was_not_used_comes_back() -> None:
    clock, acme = FakeClock(), tenant(tokens_per_min=100)
    door = admission(clock, acme)
    with door.admit(acme) as ticket:
        ticket.reserve(num_prompt_tokens=20, max_tokens=60)
        with door.admit(acme) as second, pytest.raises(RateLimited, match="20 of 100") as error:
            second.reserve(20, 10)
        assert error.value.retry_after_s == pytest.approx(6)
        ticket.num_used = 30
    with door.admit(acme) as ticket:
        ticket.reserve(20, 50)
        with pytest.raises(RateLimited, match="has 0 of 100 left, this request may use 1"):
            ticket.reserve(0, 1)


def test_more_than_a_minutes_tokens_could_never_be_had() -> None:
    acme = tenant(tokens_per_min=100)
    with (
        admission(FakeClock(), acme).admit(acme) as ticket,
        pytest.raises(InvalidArgument, match=r"max_tokens: 81 .*prompt \(20\).* 100 tokens"),
    ):
        ticket.reserve(20, 81)


Steps = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end"]),
        st.integers(1, 60),  # tokens to reserve, or an index
        st.floats(0, 1),  # of which are used
        st.floats(0, 20),  # seconds until the next step
    ),
    max_size=60,
)


@given(Steps)
def test_quotas_hold_at_every_moment_however_requests_overlap(
    steps: list[tuple[str, int, float, float]],
) -> None:
    clock, acme = FakeClock(), tenant(tokens_per_min=100, requests_per_min=20, max_concurrent=3)
    door = admission(clock, acme)
    begun_at = clock.now
    num_requests, num_used = 0, 0
    running: list[tuple[AbstractContextManager[Ticket], Ticket, int]] = []
    for what, number, share, gap_s in steps:
        clock.now += gap_s
        if what == "end" and running:
            held, ticket, reserved = running.pop(number % len(running))
            ticket.num_used = int(share * reserved)
            _close(held)
            num_used += ticket.num_used
        elif what == "begin":
            held = door.admit(acme)
            try:
                ticket = held.__enter__()
            except RateLimited:
                continue
            num_requests += 1
            try:
                ticket.reserve(number, 0)
            except RateLimited:
                _close(held)
                continue
            running.append((held, ticket, number))
        minutes = (clock.now - begun_at) / 60
        assert len(running) == door.num_running <= 3
        assert num_requests <= 20 + 20 * minutes + 1e-6
        under_way = sum(reserved for _, _, reserved in running)
        assert num_used + under_way <= 100 + 100 * minutes + 1e-6
    for held, _, _ in running:
        _close(held)
    assert door.num_running == 0
    clock.now += 60
    with door.admit(acme) as ticket:
        ticket.reserve(100, 0)


def _close(held: AbstractContextManager[Ticket]) -> None:
    held.__exit__(None, None, None)
