"""The whole file, and what its sections must agree on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from colm_serve.config.decode import DecodeConfig
from colm_serve.config.limits import LimitsConfig
from colm_serve.config.planner import PlannerConfig
from colm_serve.config.prefill import PrefillConfig
from colm_serve.config.ray import RayConfig
from colm_serve.config.router import RouterConfig
from colm_serve.config.section import Section
from colm_serve.config.sla import SLA_CLASSES, SlaClass
from colm_serve.config.standby import StandbyConfig
from colm_serve.config.tenant import TenantConfig
from colm_serve.config.tls import TlsConfig, check_bind_address, is_loopback
from colm_serve.config.yaml_file import load_yaml
from colm_serve.errors import InvalidConfig


class ClusterConfig(Section):
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
    limits: LimitsConfig = LimitsConfig()
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
