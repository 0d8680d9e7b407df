"""The cluster's configuration: one YAML file, read once, frozen, every key checked."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from colm_serve.errors import InvalidConfig

MAX_S = 86400.0
Seconds = Annotated[float, Field(gt=0, le=MAX_S)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Model = TypeVar("Model", bound=BaseModel)

#: Begins an API key that is given by its SHA-256.
_HASHED = "sha256:"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsConfig(_Frozen):
    """Mutual TLS between workers and towards clients: PEM files of one cluster CA."""

    ca_file: Path
    cert_file: Path
    key_file: Path


class SlaClass(_Frozen):
    """What a kind of request is promised, and the chain levels it may run at.

    The router takes the highest level inside the bounds at which the targets hold; with no
    targets that is `max_level`. Where not everybody can have it, those of more `weight` have more.
    """

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    min_level: Count = 1
    max_level: Count | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    deadline_s: Seconds = Field(default=300.0, description="from receipt to the last token")

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> SlaClass:
        if self.max_level is not None and self.min_level > self.max_level:
            raise ValueError(f"min_level {self.min_level} is above max_level {self.max_level}")
        return self


def light_classes(sla_classes: Mapping[str, SlaClass]) -> frozenset[str]:
    """The names of those that have less weight than another."""
    most = max(sla.weight for sla in sla_classes.values())
    return frozenset(name for name, sla in sla_classes.items() if sla.weight < most)


#: What there is without any config.
SLA_CLASSES = {
    "default": SlaClass(),
    "interactive": SlaClass(ttft_ms=1000, tpot_ms=100, weight=4, deadline_s=60),
    "batch": SlaClass(weight=0.25, deadline_s=3600),
}


class WorkerConfig(_Frozen):
    """What prefill and decode workers have in common."""

    count: Count = 1
    num_cpus: float = Field(default=1.0, gt=0, description="what Ray reserves for one worker")
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: Count = 1
    kv_tokens: Count = 16384
    page_size: Count = 16
    max_request_s: Seconds = Field(
        default=3600.0, description="ends a call whose caller set no deadline, or a longer one"
    )
    host: str = "127.0.0.1"

    @property
    def num_pages(self) -> int:
        return -(-self.kv_tokens // self.page_size)


class SparseConfig(_Frozen):
    """Long prompts' rows attend to chosen keys only: faster, and no longer exact.

    The keys and values are then an approximation that every level reads, and decode workers cache
    and share them as they do exact ones.
    """

    selector: Literal["none", "minference", "adaptive"] = Field(
        default="none",
        description="minference: the patterns of pattern_file; adaptive: the fewest key blocks "
        "whose estimated attention mass is at least gamma",
    )
    pattern_file: Path | None = Field(
        default=None, description="as `colm search-patterns` writes it, in MInference's format"
    )
    gamma: float = Field(default=0.95, gt=0, le=1)
    min_tokens: Count = Field(
        default=16384, description="shorter prompts attend to all keys; the whole prompt counts"
    )

    @model_validator(mode="after")
    def _patterns_are_given_where_read(self) -> SparseConfig:
        if (self.selector == "minference") != (self.pattern_file is not None):
            raise ValueError(
                f"pattern_file {self.pattern_file} with selector {self.selector}: minference "
                "needs one, the others read none"
            )
        return self


class PrefillConfig(WorkerConfig):
    """A prefill worker: chunks of several prompts up to `chunk_tokens` a forward pass."""

    chunk_tokens: Count = 512
    max_queued: Count = 64
    stall_timeout_s: Seconds = 30.0
    sparse: SparseConfig = SparseConfig()


class SpeculationConfig(_Frozen):
    """Tokens drafted at a lower level and verified at the request's own, where that is faster."""

    enabled: bool = True
    sampled: bool = Field(
        default=False,
        description="also for requests with a temperature: each of their tokens then takes the "
        "drafter's scores, drafted or not, and depends on draft_level beside the seed",
    )
    draft_level: Count = 1
    max_drafts: Count = Field(default=8, description="of one request in one step")


class DecodeConfig(WorkerConfig):
    """A decode worker: at most `max_rows` rows a step."""

    max_rows: Count = 32
    max_waiting: Count = 64
    max_batch_tokens: Count = Field(
        default=256, description="a step's rows, verified drafts and locally computed prompt"
    )
    expected_output_tokens: Count = Field(
        default=256, description="output that pages are reserved for; more is taken as it comes"
    )
    local_prefill_tokens: int = Field(
        default=32, ge=0, description="a missing suffix up to this long is computed here"
    )
    adaptive_prefill: bool = Field(
        default=True,
        description="compute longer ones here too, whole or in part, where measured speeds and "
        "queues make that the least delay; else only when no prefill worker can",
    )
    frame_timeout_s: Seconds = Field(
        default=10.0,
        description="a prefill worker that sends nothing for so long is left; while it is busy "
        "with other prompts it says so after each of its forward passes",
    )
    kv_codec: Literal["raw", "bf16", "int8", "fp8", "auto"] = Field(
        default="raw",
        description="how prefill workers write K and V for the wire: raw is exact, the others are "
        "smaller; auto is raw while the transfer hides behind the prefill, else the mildest that "
        "would",
    )
    shared_memory: bool = Field(
        default=True,
        description="prefill workers on the same machine, of the same user and PID namespace, put "
        "K and V into memory that both map, with TLS as well: they do not leave the machine",
    )
    kv_connections: Count = Field(
        default=1,
        le=16,
        description="among which the layers of one prompt's K and V are shared, where they do not "
        "come through shared memory: for links that are wider than a core can fill",
    )
    weight_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="how matrices are kept: auto is float32 on a CPU and bfloat16 on a GPU; the "
        "smaller ones are for a CPU, whose steps take as long as their bytes take to read",
    )
    speculation: SpeculationConfig = SpeculationConfig()

    @model_validator(mode="after")
    def _prompts_fit_beside_rows(self) -> DecodeConfig:
        if self.max_batch_tokens <= self.max_rows:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is not above max_rows {self.max_rows}: "
                "a prompt computed beside a full batch would stand still"
            )
        return self


class RouterConfig(_Frozen):
    """The front door."""

    host: str = "127.0.0.1"
    grpc_port: Port = 0
    http_port: Port = 0
    max_concurrent: Count = Field(default=256, description="requests served at a time")
    max_queued: int = Field(default=256, ge=0, description="requests that wait for room")
    status_interval_s: Seconds = 0.5
    status_timeout_s: Seconds = 2.0
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


class StandbyConfig(_Frozen):
    """Prefill workers finish texts at level 1 while there is no decode worker.

    They load the head, and chain 1 once more, when that happens, and drop them after it.
    """

    enabled: bool = True
    after_s: Seconds = Field(
        default=2.0, description="how long a request waits for a decode worker first"
    )
    kv_tokens: Count = Field(default=16384, description="beside those of prefill.kv_tokens")


class PlannerConfig(_Frozen):
    """Whether worker counts follow the load, and how far; else they stay as configured."""

    enabled: bool = False
    min_prefill: Count = 1
    max_prefill: Count = 8
    min_decode: Count = 1
    max_decode: Count = 8
    interval_s: Seconds = 30.0
    hysteresis: float = Field(
        default=0.25, ge=0, le=10, description="load is let grow by this share before workers go"
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> PlannerConfig:
        for kind in ("prefill", "decode"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low > high:
                raise ValueError(f"min_{kind} {low} is above max_{kind} {high}")
        return self


class TenantConfig(_Frozen):
    """Somebody who calls with API keys of their own, and how much they may use."""

    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="or sha256:<hex> of one, so that the file holds no secret"
    )
    sla_classes: tuple[str, ...] = Field(
        default=(), description="that its requests may name, the first by default; none: all"
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="its share, to others', where there is no room"
    )
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = Field(
        default=None, description="of prompts and output; what max_tokens reserves comes back"
    )
    max_concurrent: Count | None = None

    @field_validator("api_keys")
    @classmethod
    def _keys_can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for position, secret in enumerate(keys):
            key = secret.get_secret_value()
            if key.startswith(_HASHED):
                is_good = re.fullmatch("[0-9a-f]{64}", key.removeprefix(_HASHED)) is not None
            else:
                is_good = re.fullmatch(r"[!-~]{16,512}", key) is not None
            if not is_good:
                raise ValueError(
                    f"key {position + 1} has {len(key)} characters; allowed: 16 to 512 visible "
                    f"ASCII characters, or {_HASHED} and 64 hexadecimal digits"
                )
        return keys

    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each key."""
        return tuple(_key_digest(secret.get_secret_value()) for secret in self.api_keys)


def _key_digest(key: str) -> bytes:
    if key.startswith(_HASHED):
        return bytes.fromhex(key.removeprefix(_HASHED))
    return hashlib.sha256(key.encode()).digest()


class RayConfig(_Frozen):
    """Where Ray runs: "local" starts one for this cluster, else an address to join."""

    address: str = "local"
    start_timeout_s: Seconds = 120.0
    health_interval_s: Seconds = 1.0
    drain_s: Seconds = Field(
        default=30.0,
        description="how long a worker that is to go has for its requests; then they move",
    )


class ClusterConfig(_Frozen):
    """A whole cluster: model, worker counts, SLA classes, security."""

    model: Path
    model_name: str = ""
    variants: dict[str, Path] = Field(
        default_factory=dict,
        description="further models on the same chain 1, by name; each has decode.count workers "
        "of its own, and all share the prefill workers",
    )
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    router: RouterConfig = RouterConfig()
    standby: StandbyConfig = StandbyConfig()
    planner: PlannerConfig = PlannerConfig()
    ray: RayConfig = RayConfig()
    tls: TlsConfig | None = None
    default_sla_class: str = "default"
    sla_classes: dict[str, SlaClass] = SLA_CLASSES
    tenants: dict[str, TenantConfig] = Field(
        default_factory=dict, description="who may call; with none, anybody on this machine"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> ClusterConfig:
        if self.default_sla_class not in self.sla_classes:
            raise ValueError(
                f"default_sla_class {self.default_sla_class!r} is not one of sla_classes "
                f"{sorted(self.sla_classes)}"
            )
        for room in ("prefill", "decode", "router"):
            host = getattr(self, room).host
            check_bind_address(f"{room}.host", host, has_tls=self.tls is not None)
        self._check_variants()
        self._check_tenants()
        return self

    def _check_variants(self) -> None:
        for taken in ("", self.served_name):
            if taken in self.variants:
                allowed = f"a name, and another than the model's own, {self.served_name}"
                raise InvalidConfig("variants", taken, allowed)
        if self.variants and self.planner.enabled:
            raise InvalidConfig("planner.enabled", True, "false where there are variants")

    def _check_tenants(self) -> None:
        owners: dict[bytes, str] = {}
        for name, tenant in self.tenants.items():
            key = f"tenants.{name}"
            if not tenant.api_keys:
                raise InvalidConfig(f"{key}.api_keys", [], "one key or more")
            for sla_class in tenant.sla_classes:
                if sla_class not in self.sla_classes:
                    allowed = f"sla_classes: {', '.join(sorted(self.sla_classes))}"
                    raise InvalidConfig(f"{key}.sla_classes", sla_class, allowed)
            for position, digest in enumerate(tenant.key_digests()):
                if (owner := owners.setdefault(digest, name)) != name:
                    where = f"{key}.api_keys[{position}]"
                    raise InvalidConfig(where, "…", f"a key of its own, not one of {owner}'s")
        if not self.tenants and not is_loopback("router.host", self.router.host):
            allowed = "tenants with API keys, once router.host is not a loopback address"
            raise InvalidConfig("tenants", {}, allowed)

    @property
    def served_name(self) -> str:
        """The name clients put in the `model` field."""
        return self.model_name or self.model.name

    def folder_of(self, variant: str) -> Path:
        """The model folder of a variant; "" is the cluster's own model."""
        return self.variants[variant] if variant else self.model

    def _with_paths_from(self, folder: Path) -> ClusterConfig:
        tls = self.tls and TlsConfig(
            ca_file=(folder / self.tls.ca_file).resolve(),
            cert_file=(folder / self.tls.cert_file).resolve(),
            key_file=(folder / self.tls.key_file).resolve(),
        )
        sparse = self.prefill.sparse
        if sparse.pattern_file is not None:
            path = (folder / sparse.pattern_file).resolve()
            sparse = sparse.model_copy(update={"pattern_file": path})
        prefill = self.prefill.model_copy(update={"sparse": sparse})
        model = (folder / self.model).resolve()
        variants = {name: (folder / path).resolve() for name, path in self.variants.items()}
        update = {"model": model, "variants": variants, "tls": tls, "prefill": prefill}
        return self.model_copy(update=update)

    @classmethod
    def load(cls, path: Path) -> ClusterConfig:
        """Read a YAML file; relative paths in it count from its folder.

        Raises:
            InvalidConfig: not there, not YAML, an unknown key or a value that is not allowed.
        """
        config = load_yaml(cls, "config", path)
        return config._with_paths_from(path.parent)


def is_loopback(key: str, host: str) -> bool:
    """Whether only this machine can connect to an address.

    Raises:
        InvalidConfig: `host` is no IP address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InvalidConfig(key, host, "localhost or an IP address") from error


def load_yaml(model: type[Model], name: str, path: Path) -> Model:
    """Read and check a YAML file; errors call the file `name`.

    Raises:
        InvalidConfig: not there, not YAML, an unknown key or a value that is not allowed.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(name, str(path), f"a readable file ({error})") from error
    except yaml.YAMLError as error:
        raise InvalidConfig(name, str(path), f"YAML ({error})") from error
    if not isinstance(raw, dict):
        raise InvalidConfig(name, str(path), "a mapping of keys to values")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _first_problem(error) from error


def check_bind_address(key: str, host: str, *, has_tls: bool) -> None:
    """Refuse to listen in plaintext where others than this machine could connect.

    Raises:
        InvalidConfig: `host` is not loopback and there is no TLS, or is no IP address.
    """
    if not is_loopback(key, host) and not has_tls:
        raise InvalidConfig(key, host, "a loopback address, or any address once `tls` is set")


def _first_problem(error: ValidationError) -> InvalidConfig:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "config"
    value = problem.get("input")
    if key.startswith("tenants.") and "key" in key:
        value = "…"  # an API key is nothing to print
    shown = value if not isinstance(value, dict) else sorted(value)
    return InvalidConfig(key, shown, problem["msg"])
