"""Who may begin a request now: a bound on all, and each tenant's quotas. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from colm_serve.errors import InvalidArgument, RateLimited, ResourceExhausted
from colm_serve.router.tenants import Tenant
from colm_serve.router.token_bucket import TokenBucket

#: Seconds on a clock that never goes back.
Clock = Callable[[], float]


class Admission:
    """At most `max_under_way` requests, of each tenant what its quotas allow."""

    def __init__(self, max_under_way: int, tenants: Iterable[Tenant], clock: Clock) -> None:
        self._max_under_way = max_under_way
        self._quotas = {tenant.name: Quota(tenant, clock) for tenant in tenants}
        self.num_running = 0

    @contextmanager
    def admit(self, tenant: Tenant) -> Iterator[Ticket]:
        """Hold a place; raises as `begin` does."""
        ticket = self.begin(tenant)
        try:
            yield ticket
        finally:
            self.end(ticket)

    def begin(self, tenant: Tenant) -> Ticket:
        """Take a place, until `end`; a refusal takes nothing.

        Raises:
            ResourceExhausted: all places are taken.
            RateLimited: the tenant has as many requests as it may have.
        """
        if self.num_running >= self._max_under_way:
            raise ResourceExhausted(
                f"{self.num_running} requests are under way, the most this router takes; "
                "try again later"
            )
        quota = self._quotas[tenant.name]
        quota.begin()
        self.num_running += 1
        return Ticket(quota)

    def end(self, ticket: Ticket) -> None:
        """The request is over: its place is free, and what it has not used is given back."""
        self.num_running -= 1
        ticket.end()


class Ticket:
    """One admitted request's claim on its tenant's tokens."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._num_reserved = 0
        self.num_used = 0

    def reserve(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Take all that the request may use; what `num_used` leaves is given back at its end.

        Raises:
            InvalidArgument: it is more than the tenant has in a minute.
            RateLimited: it is more than the tenant has left.
        """
        self._quota.reserve(num_prompt_tokens, max_tokens)
        self._num_reserved = num_prompt_tokens + max_tokens

    def end(self) -> None:
        self._quota.give_back(max(0, self._num_reserved - self.num_used))
        self._quota.end()


class Quota:
    """What a tenant has used of its limits."""

    def __init__(self, tenant: Tenant, clock: Clock) -> None:
        self._name = tenant.name
        self._clock = clock
        self._max_concurrent = tenant.config.max_concurrent
        self._requests = _bucket(tenant.config.requests_per_min, clock)
        self._tokens = _bucket(tenant.config.tokens_per_min, clock)
        self._num_running = 0

    def begin(self) -> None:
        if self._max_concurrent is not None and self._num_running >= self._max_concurrent:
            raise RateLimited(
                f"max_concurrent: {self._num_running} requests of tenant {self._name!r} are under "
                f"way; allowed: {self._max_concurrent}"
            )
        if self._requests is not None:
            wait_s = self._requests.take(1, self._clock())
            if wait_s is not None:
                raise RateLimited(
                    f"requests_per_min: tenant {self._name!r} has used its "
                    f"{self._requests.per_min}; the next is due in {wait_s:.3f} s",
                    wait_s,
                )
        self._num_running += 1

    def end(self) -> None:
        self._num_running -= 1

    def reserve(self, num_prompt_tokens: int, max_tokens: int) -> None:
        bucket, num_tokens = self._tokens, num_prompt_tokens + max_tokens
        if bucket is None:
            return
        if num_tokens > bucket.per_min:
            raise InvalidArgument(
                "max_tokens",
                max_tokens,
                f"prompt ({num_prompt_tokens}) and output together up to {bucket.per_min} tokens, "
                f"the tokens_per_min of tenant {self._name!r}",
            )
        wait_s = bucket.take(num_tokens, self._clock())
        if wait_s is not None:
            raise RateLimited(
                f"tokens_per_min: tenant {self._name!r} has {bucket.num_left(self._clock())} of "
                f"{bucket.per_min} left, this request may use {num_tokens}; it can in "
                f"{wait_s:.3f} s",
                wait_s,
            )

    def give_back(self, num_tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.give_back(num_tokens, self._clock())


def _bucket(per_min: int | None, clock: Clock) -> TokenBucket | None:
    return None if per_min is None else TokenBucket(per_min, clock())
