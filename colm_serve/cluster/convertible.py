"""The Ray shell of a prefill worker whose process can decode too: as a standby, or from then on."""

from __future__ import annotations

from colm_serve.config import ClusterConfig
from colm_serve.core import Health, Member
from colm_serve.decode_worker.actor import DecodeActor
from colm_serve.engine.loading import return_freed_memory
from colm_serve.prefill_worker.actor import PrefillActor
from colm_serve.transport.host import settle_heap


class ConvertibleActor:
    """Hosts one worker, and a standby on request; it serves when the constructor returns."""

    def __init__(self, config: ClusterConfig, worker_id: str) -> None:
        self._config = config
        self._worker_id = worker_id
        self._worker: PrefillActor | DecodeActor = PrefillActor(config, worker_id)
        self._standby: DecodeActor | None = None

    def describe(self) -> Member:
        """Who this is and where it listens."""
        return self._worker.describe()

    def health(self) -> Health:
        """How the worse of its workers gets on; raises when an engine has failed."""
        workers = (self._worker, *([] if self._standby is None else [self._standby]))
        return max(
            (worker.health() for worker in workers), key=lambda h: max(h.loop_stalled_s, h.turn_s)
        )

    def num_requests(self) -> int:
        """Under way at the worker itself."""
        return self._worker.num_requests()

    def become_decode(self, worker_id: str) -> Member:
        """Load every chain, then stop prefilling; prompts go on being computed until then."""
        prefill, self._worker = self._worker, DecodeActor(self._own_threads(), worker_id)
        prefill.stop()
        del prefill
        settle_heap()
        return_freed_memory()
        return self._worker.describe()

    def start_standby(self) -> Member:
        """Decode at level 1 as well, with pages of its own."""
        config = self._own_threads()
        decode = config.decode.model_copy(update={"kv_tokens": config.standby.kv_tokens})
        config = config.model_copy(update={"decode": decode})
        self._standby = DecodeActor(config, f"{self._worker_id}-standby", is_standby=True)
        return self._standby.describe()

    def num_standby_requests(self) -> int:
        """Under way at the standby."""
        return 0 if self._standby is None else self._standby.num_requests()

    def stop_standby(self) -> None:
        """Give the standby's memory back; texts that run there break off."""
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.stop()
            del standby
            settle_heap()
            return_freed_memory()

    def stop(self) -> None:
        self.stop_standby()
        self._worker.stop()

    def _own_threads(self) -> ClusterConfig:
        """For a worker in a process that Ray has given what a prefill worker needs."""
        update = {"num_threads": self._config.prefill.num_threads}
        return self._config.model_copy(
            update={"decode": self._config.decode.model_copy(update=update)}
        )
