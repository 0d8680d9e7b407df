"""Who calls: tenants by their API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from colm_serve.config import TenantConfig
from colm_serve.errors import Unauthenticated


@dataclass(frozen=True)
class Tenant:
    """A caller, what it may use and how much of it."""

    name: str
    config: TenantConfig


#: Everybody, where the config names no tenants.
ANYBODY = Tenant("anybody", TenantConfig())


class Tenants:
    """Finds the tenant that a request's API key belongs to."""

    def __init__(self, configs: Mapping[str, TenantConfig]) -> None:
        self._tenants = [Tenant(name, config) for name, config in configs.items()]
        self._keys = [(d, tenant) for tenant in self._tenants for d in tenant.config.key_digests()]

    @property
    def all(self) -> tuple[Tenant, ...]:
        """Every tenant there can be."""
        return tuple(self._tenants) or (ANYBODY,)

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an `Authorization` header or metadata value.

        Raises:
            Unauthenticated: it has no API key, or one that no tenant has.
        """
        if not self._tenants:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("authorization: an API key is needed, as 'Bearer <key>'")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        # Every key is compared, and whole, so that the time taken tells nothing of any.
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise Unauthenticated("authorization: no tenant has this API key")
        return found
