"""The one factory of gRPC servers and channels: limits, keepalive, TLS."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio

from colm_serve.config import TlsConfig, check_bind_address
from colm_serve.transport.unreadable import Look, RefuseUnreadable

#: A KV frame of a chunk's layer, with room to spare; prompts are far smaller.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Servers refuse pings more often than every 5 minutes unless told otherwise.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.so_reuseport", 0)]


def make_server(
    max_request_bytes: int = MAX_MESSAGE_BYTES, look: Look | None = None
) -> grpc.aio.Server:
    """A server with our limits; add servicers, `bind` it, start it.

    Args:
        look: sees a request's bytes before they are parsed, and may refuse them.
    """
    refuse = RefuseUnreadable(max_request_bytes, look)
    return grpc.aio.server(interceptors=(refuse,), options=_SERVER_OPTIONS)


def bind(server: grpc.aio.Server, host: str, port: int, tls: TlsConfig | None) -> str:
    """Listen on host:port (0: any free port) and return the bound address.

    Raises:
        InvalidConfig: plaintext beyond loopback was asked for.
        RuntimeError: the port is taken.
    """
    check_bind_address("host", host, has_tls=tls is not None)
    wanted = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if tls is None:
        bound = server.add_insecure_port(wanted)
    else:
        credentials = grpc.ssl_server_credentials(
            [(_read(tls.key_file), _read(tls.cert_file))],
            root_certificates=_read(tls.ca_file),
            require_client_auth=True,
        )
        bound = server.add_secure_port(wanted, credentials)
    return f"{wanted.rpartition(':')[0]}:{bound}"


def connect(address: str, tls: TlsConfig | None, *, is_alone: bool = False) -> grpc.aio.Channel:
    """A channel to a peer's bound address, if `is_alone` with a connection of its own."""
    # Channels to one address share a connection unless told otherwise.
    options = [*_OPTIONS, ("grpc.use_local_subchannel_pool", int(is_alone))]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        _read(tls.ca_file), _read(tls.key_file), _read(tls.cert_file)
    )
    return grpc.aio.secure_channel(address, credentials, options=options)


def _read(path: Path) -> bytes:
    return path.read_bytes()
