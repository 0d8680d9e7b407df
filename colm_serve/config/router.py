"""The router: where it listens, how it places requests, when it tries again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from colm_serve.config.section import Count, Port, Seconds, Section


class RouterConfig(Section):
    """The front door."""

    host: str = "127.0.0.1"
    grpc_port: Port = 0
    http_port: Port = 0
    max_concurrent: Count = Field(default=256, description="requests served at a time")
    max_queued: int = Field(default=256, ge=0, description="requests that wait for room")
    status_interval_s: Seconds = 0.5
    status_timeout_s: Seconds = 2.0
    stall_timeout_s: Seconds = Field(
        default=30.0, description="a client that takes nothing of its stream for so long loses it"
    )
    max_attempts: Count = 4
    policy: Literal["adaptive", "fixed_level", "aggregated"] = Field(
        default="adaptive",
        description="adaptive: the highest level at which targets hold; the others are there to "
        "compare it with. fixed_level: one level; aggregated: adaptive without prefill workers",
    )
    fixed_level: Count | None = None
    level_moves_per_s: float = Field(
        default=32.0,
        ge=0,
        le=1000,
        description="of requests that run at one decode worker; 0: they stay where they were put",
    )
    retry_share: float = Field(
        default=0.2, ge=0, le=1, description="retries that a request brings for all requests"
    )
    breaker_failures: Count = Field(
        default=5, description="requests that break off in a row before a worker is left alone"
    )
    breaker_open_s: Seconds = Field(
        default=1.0, description="how long, at first; then one request goes there as a probe"
    )

    @model_validator(mode="after")
    def _the_level_is_given_where_read(self) -> RouterConfig:
        if (self.policy == "fixed_level") != (self.fixed_level is not None):
            raise ValueError(
                f"fixed_level {self.fixed_level} with policy {self.policy}: the policy "
                "fixed_level needs one, the others read none"
            )
        return self
