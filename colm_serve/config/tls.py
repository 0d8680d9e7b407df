"""Who may connect: mutual TLS, and this machine alone without it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from colm_serve.config.section import Section
from colm_serve.errors import InvalidConfig


class TlsConfig(Section):
    """Mutual TLS between workers and towards clients: PEM files of one cluster CA."""

    ca_file: Path
    cert_file: Path
    key_file: Path


def is_loopback(key: str, host: str) -> bool:
    """Whether only this machine can connect to an address.

    Raises:
        InvalidConfig: `host` is no IP address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InvalidConfig(key, host, "localhost or an IP address") from error


def check_bind_address(key: str, host: str, *, has_tls: bool) -> None:
    """Refuse to listen in plaintext where others than this machine could connect.

    Raises:
        InvalidConfig: `host` is not loopback and there is no TLS, or is no IP address.
    """
    if not is_loopback(key, host) and not has_tls:
        raise InvalidConfig(key, host, "a loopback address, or any address once `tls` is set")
