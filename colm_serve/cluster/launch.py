"""Start a cluster from its configuration and stop it without a trace."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray

from colm_serve.cluster.controller import ClusterView, Controller
from colm_serve.cluster.placement import max_cpus
from colm_serve.config import ClusterConfig
from colm_serve.engine.sparse.sparsity import make_sparsity
from colm_serve.errors import ColmError, Unavailable
from colm_serve.model.checkpoint import check_folder
from colm_serve.model.kv_identity import check_variant
from colm_serve.router.actor import RouterAddresses

_STOP_TIMEOUT_S = 30.0
_NEWS_TIMEOUT_S = 5.0


class Cluster:
    """A running cluster; a context manager that leaves no process behind."""

    def __init__(self, config: ClusterConfig) -> None:
        """Start it and wait until it serves.

        Raises:
            ColmError: a bad model folder, too few resources, a worker that does not start.
        """
        # Cheap, and a clearer message than one out of an actor's constructor.
        make_sparsity(config.prefill.sparse, check_folder(config.model))
        for variant in config.variants.values():
            check_folder(variant)
            check_variant(variant, config.model)
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _init_ray(config)
        self._controller: Any = ray.remote(Controller).options(num_cpus=0).remote(config)
        self._num_heard = 0
        timeout_s = 2 * config.ray.start_timeout_s
        try:
            self.addresses: RouterAddresses = ray.get(
                self._controller.start.remote(), timeout=timeout_s
            )
        except ray.exceptions.RayTaskError as error:
            self.stop()
            cause = error.cause
            raise cause if isinstance(cause, ColmError) else Unavailable(str(error)) from error
        except BaseException:
            self.stop()
            raise

    def view(self) -> ClusterView:
        """Who is in the cluster now."""
        view: ClusterView = ray.get(self._controller.view.remote(), timeout=_STOP_TIMEOUT_S)
        return view

    def news(self) -> tuple[str, ...]:
        """What the cluster has done of its own accord since this was last asked, a line each.

        Raises:
            Unavailable: the controller is gone, or does not answer.
        """
        try:
            self._num_heard, lines = ray.get(
                self._controller.news.remote(self._num_heard), timeout=_NEWS_TIMEOUT_S
            )
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise Unavailable(f"the controller does not answer: {error}") from error
        return tuple(lines)

    def stop(self) -> None:
        """Stop every process of the cluster, and Ray if this started it; safe to call twice."""
        if self._controller is None:
            return
        controller, self._controller = self._controller, None
        with suppress(ray.exceptions.RayError):
            ray.get(controller.stop.remote(), timeout=_STOP_TIMEOUT_S)
        ray.kill(controller)
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _init_ray(config: ClusterConfig) -> None:
    quiet = {"configure_logging": False, "logging_level": logging.ERROR, "log_to_driver": False}
    if config.ray.address != "local":
        ray.init(address=config.ray.address, **quiet)
        return
    wanted = max_cpus(config)
    # A laptop hosts the whole cluster: what Ray counts is places, not cores.
    num_cpus = max(os.cpu_count() or 1, int(-(-wanted // 1)))
    try:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    except RuntimeError as error:
        raise Unavailable(f"Ray did not start: {error}") from error
