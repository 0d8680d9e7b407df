"""What Prometheus scrapes from a router; the names follow what users of peers already chart."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from colm_serve.core import DecodeStatus
from colm_serve.errors import ColmError, RateLimited, ResourceExhausted
from colm_serve.router.cluster_view import ClusterView
from colm_serve.router.lifecycle import Lifecycle, Stage
from colm_serve.router.placing.latency_model import Prediction
from colm_serve.router.request import Finished, GenerationEvent, Started, Token
from colm_serve.transport.status import status_code

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_RATIO = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """One router's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._predicted: dict[str, Histogram] = {}
        self._ratio: dict[str, Histogram] = {}

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"colm:{name}_seconds", what, buckets=buckets, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"colm:{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"colm:{name}", what, labels, registry=registry)

        self._ttft = histogram("time_to_first_token", "Receipt to first token.", _REQUEST_S)
        self._itl = histogram("inter_token_latency", "Token to token.", _TOKEN_S)
        self._e2e = histogram("e2e_request_latency", "Receipt to end.", _REQUEST_S)
        self._placing = histogram("placement_latency", "Receipt to placement.", _REQUEST_S)
        self._running = gauge("num_requests_running", "Requests under way at this router.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = counter("prompt_tokens_cached", "Of those, found in a prefix cache.")
        self._tokens = counter("generation_tokens", "Tokens sent, by chain level.", "level")
        self._level = counter("request_level", "Requests started, by chain level.", "level")
        self._success = counter("request_success", "Finished requests.", "finished_reason")
        self._errors = counter("request_errors", "Failed requests, by gRPC status.", "code")
        self._retries = counter("request_failovers", "Attempts that another one followed.")
        self._denied = counter("retries_denied", "Failed for want of retry budget.")
        self._circuits = counter("circuit_breakers_opened", "Workers left alone for a while.")
        self._moves = counter("level_moves", "Level changes in mid-text.", "why")
        for name, what, buckets in (
            ("ttft", "time to first token", _REQUEST_S),
            ("tpot", "time per output token", _TOKEN_S),
        ):
            self._predicted[name] = histogram(f"predicted_{name}", f"Predicted {what}.", buckets)
            self._ratio[name] = Histogram(
                f"colm:{name}_over_predicted",
                f"Seen {what} over that predicted when the request was placed.",
                buckets=_RATIO,
                registry=registry,
            )
        self._brownouts = counter(
            "request_brownouts", "Requests started below the level of an idle cluster.", "level"
        )
        self._refusals = counter("request_refusals", "Of those failed, for want of what.", "reason")
        self._queued = gauge("num_requests_queued", "Requests that wait for room.", "tenant")
        worker = ("kind", "worker")
        self._reachable = gauge("worker_reachable", "1 if it answered its last call.", *worker)
        self._usage = gauge("kv_cache_usage_perc", "Pages in use, 1 is all.", *worker)
        self._waiting = gauge("num_requests_waiting", "Requests that wait at a worker.", *worker)
        self._preemptions = gauge("num_preemptions", "Since the worker started.", *worker)
        self._row_failures = gauge(
            "row_failures", "Requests that failed alone since the worker started.", *worker
        )

    def event(self, event: GenerationEvent, lifecycle: Lifecycle) -> None:
        """Count an event on its way to the client."""
        match event:
            case Started():
                self._level.labels(str(event.level)).inc()
                if event.is_brownout:
                    self._brownouts.labels(str(event.level)).inc()
                self._placing.observe(lifecycle.between_s(Stage.RECEIVED, Stage.PLACED) or 0.0)
            case Token():
                self._tokens.labels(str(event.level)).inc()
                if lifecycle.token_gap_s is None:
                    ttft_s = lifecycle.between_s(Stage.RECEIVED, Stage.FIRST_TOKEN)
                    self._ttft.observe(ttft_s or 0.0)
                else:
                    self._itl.observe(lifecycle.token_gap_s)
            case Finished():
                self._success.labels(event.reason.value).inc()
                self._prompt_tokens.inc(event.usage.num_prompt_tokens)
                self._cached_tokens.inc(event.usage.num_cached_tokens)
                self._e2e.observe(lifecycle.between_s(Stage.RECEIVED, Stage.FINISHED) or 0.0)

    def failed(self, error: ColmError) -> None:
        self._errors.labels(status_code(error).name).inc()
        if isinstance(error, ResourceExhausted):
            is_quota = isinstance(error, RateLimited)
            self._refusals.labels("quota" if is_quota else "room").inc()

    def failed_over(self) -> None:
        self._retries.inc()

    def retry_denied(self) -> None:
        self._denied.inc()

    def circuit_opened(self) -> None:
        self._circuits.inc()

    def level_moved(self, why: str) -> None:
        """`why`: "down" or "up" by the router, "client"."""
        self._moves.labels(why).inc()

    def predicted(self, prediction: Prediction, lifecycle: Lifecycle) -> None:
        """Compare what a finished request got with what was predicted when it was placed."""
        ttft_s = lifecycle.between_s(Stage.PLACED, Stage.FIRST_TOKEN)
        for name, predicted_s, seen_s in (
            ("ttft", prediction.ttft_s, ttft_s),
            ("tpot", prediction.tpot_s, lifecycle.tpot_s),
        ):
            if seen_s is not None and predicted_s > 0:
                self._predicted[name].observe(predicted_s)
                self._ratio[name].observe(seen_s / predicted_s)

    def render(self, view: ClusterView, num_running: int, num_queued: Mapping[str, int]) -> bytes:
        """Prometheus' text format, with the workers as the router knows them now.

        Args:
            num_queued: requests of each tenant that wait for room.
        """
        self._running.set(num_running)
        for tenant, number in num_queued.items():
            self._queued.labels(tenant).set(number)
        for gauge in (
            self._reachable,
            self._usage,
            self._waiting,
            self._preemptions,
            self._row_failures,
        ):
            gauge.clear()
        for record in view.records:
            labels = (record.member.kind.value, record.member.worker_id)
            self._reachable.labels(*labels).set(record.is_reachable)
            status = record.status
            if status is not None:
                used = status.num_pages - status.num_free_pages
                self._usage.labels(*labels).set(used / max(1, status.num_pages))
                self._waiting.labels(*labels).set(status.num_waiting)
            if isinstance(status, DecodeStatus):
                self._preemptions.labels(*labels).set(status.num_preemptions)
                self._row_failures.labels(*labels).set(status.num_failed_rows)
        return generate_latest(self._registry)
