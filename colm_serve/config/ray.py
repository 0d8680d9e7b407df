"""Where Ray runs the processes."""

from __future__ import annotations

from pydantic import Field

from colm_serve.config.section import Seconds, Section


class RayConfig(Section):
    """Where Ray runs: "local" starts one for this cluster, else an address to join."""

    address: str = "local"
    start_timeout_s: Seconds = 120.0
    health_interval_s: Seconds = 1.0
    still_s: Seconds = Field(
        default=10.0,
        description="a process that has neither answered nor used a processor for so long is "
        "replaced",
    )
    busy_s: Seconds = Field(
        default=120.0,
        description="and one that works but does not answer, or is in one pass, for so long",
    )
    drain_s: Seconds = Field(
        default=30.0,
        description="how long a worker that is to go has for its requests; then they move",
    )
