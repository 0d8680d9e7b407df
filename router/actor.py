"""The Ray shell of the router: build, serve, report."""

from __future__ import annotations

from dataclasses import dataclass

from colm_serve.config import ClusterConfig
from colm_serve.core import Health, Membership
from colm_serve.router.planner import Demand, WorkerCosts
from colm_serve.router.server import RouterService
from colm_serve.transport.host import ServiceThread, settle_heap


@dataclass(frozen=True)
class RouterAddresses:
    """Where clients reach the router."""

    grpc: str
    http: str

    @property
    def grpc_port(self) -> int:
        return int(self.grpc.rpartition(":")[2])

    @property
    def http_port(self) -> int:
        return int(self.http.rpartition(":")[2])


class RouterActor:
    """Hosts the router; it serves when the constructor returns."""

    def __init__(self, config: ClusterConfig) -> None:
        self._service = RouterService(config)
        self._host = ServiceThread(self._service)
        self._service.start_reading()
        settle_heap()

    def describe(self) -> RouterAddresses:
        return RouterAddresses(self._service.grpc_address, self._service.http_address)

    def health(self) -> Health:
        """How it gets on."""
        return self._host.health()

    def update_membership(self, membership: Membership) -> None:
        self._service.update_membership(membership)

    def load(self) -> tuple[tuple[Demand, ...], WorkerCosts | None]:
        """What the planner decides on."""
        return self._service.load()

    def stop(self) -> None:
        self._host.stop()
