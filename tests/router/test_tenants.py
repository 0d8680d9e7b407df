from __future__ import annotations

import hashlib

import pytest

from colm_serve.config import TenantConfig
from colm_serve.errors import Unauthenticated
from colm_serve.router.tenants import ANYBODY, Tenants

ACME, BOLT = "sk-acme-0123456789", "sk-bolt-0123456789"


def tenants() -> Tenants:
    hashed = "sha256:" + hashlib.sha256(BOLT.encode()).hexdigest()
    return Tenants(
        {
            "acme": TenantConfig.model_validate({"api_keys": [ACME, ACME + "2"]}),
            "bolt": TenantConfig.model_validate({"api_keys": [hashed]}),
        }
    )


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        (f"Bearer {ACME}", "acme"),
        (f"bearer  {ACME}2", "acme"),
        (f"Bearer {BOLT}", "bolt"),
    ],
)
def test_a_key_tells_its_tenant(authorization: str, name: str) -> None:
    assert tenants().authenticate(authorization).name == name


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        (None, "an API key is needed"),
        ("", "an API key is needed"),
        (ACME, "an API key is needed"),
        (f"Basic {ACME}", "an API key is needed"),
        ("Bearer ", "an API key is needed"),
        (f"Bearer {ACME[:-1]}", "no tenant has this API key"),
        (f"Bearer {ACME}é", "no tenant has this API key"),
        ("Bearer sha256:" + "0" * 64, "no tenant has this API key"),
    ],
)
def test_who_is_not_known_is_told_so_and_no_key(authorization: str, message: str) -> None:
    with pytest.raises(Unauthenticated, match=f"authorization: {message}") as error:
        tenants().authenticate(authorization)
    assert "sk-" not in str(error.value)


def test_a_hash_is_no_key() -> None:
    hashed = "sha256:" + hashlib.sha256(BOLT.encode()).hexdigest()
    with pytest.raises(Unauthenticated):
        tenants().authenticate(f"Bearer {hashed}")


def test_without_tenants_all_are_welcome() -> None:
    open_to_all = Tenants({})
    assert open_to_all.all == (ANYBODY,)
    assert open_to_all.authenticate(None) is ANYBODY
    assert open_to_all.authenticate("Bearer whatever") is ANYBODY
