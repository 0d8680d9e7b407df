"""The Ray actor in each slot: made, called, ended."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from colm_serve.cluster.convertible import ConvertibleActor
from colm_serve.cluster.placement import Role, Slot
from colm_serve.decode_worker.actor import DecodeActor
from colm_serve.errors import ColmError, Unavailable
from colm_serve.router.actor import RouterActor

logger = logging.getLogger(__name__)

_CLASSES: dict[Role, type] = {
    Role.ROUTER: RouterActor,
    Role.PREFILL: ConvertibleActor,
    Role.DECODE: DecodeActor,
}
_CALL_TIMEOUT_S = 10.0
