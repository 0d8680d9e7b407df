"""The Ray shell of a prefill worker: build, serve, report."""

from __future__ import annotations

import secrets

import torch

from colm_serve.config import ClusterConfig
from colm_serve.core import Health, Member, WorkerKind
from colm_serve.engine.loading import load_for_serving
from colm_serve.prefill_worker.service import PrefillService
from colm_serve.prefill_worker.worker import PrefillWorker
from colm_serve.transport.host import ServiceThread, settle_heap


class PrefillActor:
    """Hosts one prefill worker; it serves when the constructor returns."""

    def __init__(self, config: ClusterConfig, worker_id: str) -> None:
        torch.set_num_threads(config.prefill.num_threads)
        epoch = secrets.randbits(63)
        loaded = load_for_serving(config.model, num_chains=1, with_head=False)
        self._worker = PrefillWorker(loaded, config.prefill, worker_id, epoch)
        service = PrefillService(self._worker, config.prefill, config.tls)
        self._host = ServiceThread(service)
        settle_heap()
        self._member = Member(
            WorkerKind.PREFILL, worker_id, service.address, epoch, loaded.kv_identity
        )

    def describe(self) -> Member:
        """Who this is and where it listens."""
        return self._member

    def health(self) -> Health:
        """How it gets on; raises when the engine has failed."""
        self._worker.check_alive()
        return self._host.health(self._worker.turn_s)

    def num_requests(self) -> int:
        """Under way here."""
        status = self._worker.status()
        return status.num_running + status.num_waiting

    def stop(self) -> None:
        self._host.stop()
