"""Where Ray runs the processes."""

from __future__ import annotations

from pydantic import Field

from colm_serve.config.section import Seconds, Section


class RayConfig(Section):
    """Where Ray runs: "local" starts one for this cluster, else an address to join."""

    address: str = "local"
    start_timeout_s: Seconds = 120.0
    health_interval_s: Seconds = 1.0
    drain_s: Seconds = Field(
        default=30.0,
        description="how long a worker that is to go has for its requests; then they move",
    )
