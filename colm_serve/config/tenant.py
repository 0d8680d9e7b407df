"""Tenants: their API keys and how much they may use."""

from __future__ import annotations

import hashlib
import re

from pydantic import Field, SecretStr, field_validator

from colm_serve.config.section import Count, Section

#: Begins an API key that is given by its SHA-256.
_HASHED = "sha256:"


class TenantConfig(Section):
    """Somebody who calls with API keys of their own, and how much they may use."""

    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="or sha256:<hex> of one, so that the file holds no secret"
    )
    sla_classes: tuple[str, ...] = Field(
        default=(), description="that its requests may name, the first by default; none: all"
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="its share, to others', where there is no room"
    )
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = Field(
        default=None, description="of prompts and output; what max_tokens reserves comes back"
    )
    max_concurrent: Count | None = None

    @field_validator("api_keys")
    @classmethod
    def _keys_can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for position, secret in enumerate(keys):
            key = secret.get_secret_value()
            if key.startswith(_HASHED):
                is_good = re.fullmatch("[0-9a-f]{64}", key.removeprefix(_HASHED)) is not None
            else:
                is_good = re.fullmatch(r"[!-~]{16,512}", key) is not None
            if not is_good:
                raise ValueError(
                    f"key {position + 1} has {len(key)} characters; allowed: 16 to 512 visible "
                    f"ASCII characters, or {_HASHED} and 64 hexadecimal digits"
                )
        return keys

    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each key."""
        return tuple(_key_digest(secret.get_secret_value()) for secret in self.api_keys)


def _key_digest(key: str) -> bytes:
    if key.startswith(_HASHED):
        return bytes.fromhex(key.removeprefix(_HASHED))
    return hashlib.sha256(key.encode()).digest()
