"""The Ray shell of a decode worker: build, serve, report."""

from __future__ import annotations

import secrets

import torch

from colm_serve.config import ClusterConfig
from colm_serve.core import Health, Member, WorkerKind
from colm_serve.decode_worker.service import DecodeService
from colm_serve.decode_worker.worker import DecodeWorker
from colm_serve.engine.loading import load_for_serving
from colm_serve.transport.host import ServiceThread, settle_heap


class DecodeActor:
    """Hosts one decode worker; it serves when the constructor returns.

    A standby holds chain 1 alone, whatever `variant` it is asked for.
    """

    def __init__(
        self,
        config: ClusterConfig,
        worker_id: str,
        variant: str = "",
        *,
        is_standby: bool = False,
    ) -> None:
        torch.set_num_threads(config.decode.num_threads)
        epoch = secrets.randbits(63)
        loaded = load_for_serving(
            config.folder_of(variant),
            num_chains=1 if is_standby else None,
            with_head=True,
            weight_dtype=config.decode.weight_dtype,
        )
        self._worker = DecodeWorker(
            loaded, config.decode, worker_id, epoch, None if is_standby else variant
        )
        service = DecodeService(self._worker, config.decode, config.tls)
        self._host = ServiceThread(service)
        settle_heap()
        self._member = Member(
            WorkerKind.DECODE, worker_id, service.address, epoch, loaded.kv_identity, is_standby,
            variant,
        )  # fmt: skip

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
        return sum(status.num_running) + status.num_waiting

    def stop(self) -> None:
        self._host.stop()
