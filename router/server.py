"""The router as a service: its gRPC and HTTP servers, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import uvicorn
from grpc_reflection.v1alpha import reflection

from colm_serve.config import ClusterConfig, TlsConfig, check_bind_address
from colm_serve.core import Membership
from colm_serve.model.folder import ModelFolder
from colm_serve.model.kv_identity import kv_identity_of
from colm_serve.proto.colm.v1 import generation_pb2_grpc
from colm_serve.router.http_connection import stall_limited
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.openai.http import make_app
from colm_serve.router.planner import Demand, WorkerCosts
from colm_serve.router.router import Router
from colm_serve.router.service import SERVICE_NAME, GenerationService
from colm_serve.router.tokenizer import Tokenizer
from colm_serve.transport.channel import bind, make_server
from colm_serve.transport.health import add_health

#: Connections that wait to be taken; as uvicorn's own.
_BACKLOG = 2048


def load_router(config: ClusterConfig) -> Router:
    """A router for the model folders that the config names; no weights are loaded.

    Raises:
        CheckpointError: a folder cannot be read.
        InvalidConfig: an SLA class asks for a level that a model does not have.
    """
    names = {"": config.served_name, **{name: name for name in config.variants}}
    model, *variants = (_read_model(config, variant, name) for variant, name in names.items())
    return Router(config, *model, variants)


def _read_model(
    config: ClusterConfig, variant: str, name: str
) -> tuple[ModelFacts, Tokenizer | None]:
    folder = config.folder_of(variant)
    opened = ModelFolder.open(folder, 1)
    facts = ModelFacts.of(name, opened.config, kv_identity_of(opened), variant)
    tokenizer = Tokenizer.load(folder)
    if tokenizer is not None:
        tokenizer.check_vocabulary(folder, facts.vocab_size)
    return facts, tokenizer


class RouterService:
    """Serves a router; implements `transport.host.Service`.

    `grpc_address` and `http_address` are the bound ones, empty before `start`.
    """

    def __init__(
        self, config: ClusterConfig, make_router: Callable[[ClusterConfig], Router] = load_router
    ) -> None:
        self._config = config
        self._router = make_router(config)
        self.grpc_address = ""
        self.http_address = ""

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._start_grpc()
        try:
            await self._start_http()
        except BaseException:
            await self._grpc.stop(None)
            raise

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(self._grpc.stop(grace_s), self._http.stop(grace_s))
        await self._router.close()

    def start_reading(self) -> None:
        """Have the processes for large requests ready before they are needed; from any thread."""
        self._router.reader.start()

    def update_membership(self, membership: Membership) -> None:
        """Tell the router who is in the cluster; from any thread, once started."""
        update = self._router.update_membership(membership)
        asyncio.run_coroutine_threadsafe(update, self._loop).add_done_callback(_raise)

    def load(self) -> tuple[tuple[Demand, ...], WorkerCosts | None]:
        """See `Router.load`; from any other thread, once started."""

        async def ask() -> tuple[tuple[Demand, ...], WorkerCosts | None]:
            return self._router.load()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()

    async def _start_grpc(self) -> None:
        router = self._config.router
        service = GenerationService(self._router, router.stall_timeout_s)
        self._grpc = make_server(self._config.limits.max_body_bytes, service.look)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, self._grpc)
        await add_health(self._grpc)
        names = (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self.grpc_address = bind(self._grpc, router.host, router.grpc_port, self._config.tls)
        await self._grpc.start()

    async def _start_http(self) -> None:
        router, tls = self._config.router, self._config.tls
        check_bind_address("router.host", router.host, has_tls=tls is not None)
        listener = _listen(router.host, router.http_port)
        host, port = listener.getsockname()[:2]
        self.http_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._http = _HttpServer(_http_config(self._router, tls, router.stall_timeout_s))
        self._http.start(listener)


class _HttpServer(uvicorn.Server):
    """Serves in a task, and leaves the process's signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def start(self, listener: socket.socket) -> None:
        """Begin to serve; raises OSError or ssl.SSLError for certificates it cannot use."""
        self.config.load()
        self._serving = asyncio.create_task(self.serve(sockets=[listener]))

    async def stop(self, grace_s: float) -> None:
        self.should_exit = True
        await asyncio.wait((self._serving,), timeout=grace_s)
        self.force_exit = True
        tasks = tuple(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(self._serving, *tasks, return_exceptions=True)


def _http_config(router: Router, tls: TlsConfig | None, stall_timeout_s: float) -> uvicorn.Config:
    config = uvicorn.Config(
        make_app(router),
        http=stall_limited(stall_timeout_s),
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
    )
    if tls is not None:
        config.ssl_certfile = str(tls.cert_file)
        config.ssl_keyfile = str(tls.key_file)
        config.ssl_ca_certs = str(tls.ca_file)
        config.ssl_cert_reqs = ssl.CERT_REQUIRED
    return config


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OSError when the port is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )[0]
    # Connections inherit the protocol, and where it is not said, asyncio does not set TCP_NODELAY:
    # each answer to a client that keeps its connection then waits 40 ms for the client's ACK.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _raise(update: Future[None]) -> None:
    """A failed update is reported by the future's own machinery, not lost."""
    if not update.cancelled():
        update.result()
