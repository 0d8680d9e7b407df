"""The cluster's configuration: one YAML file, read once, frozen, every key checked."""

from colm_serve.config.cluster import ClusterConfig
from colm_serve.config.decode import DecodeConfig, SpeculationConfig
from colm_serve.config.limits import LimitsConfig
from colm_serve.config.planner import PlannerConfig
from colm_serve.config.prefill import PrefillConfig, SparseConfig
from colm_serve.config.ray import RayConfig
from colm_serve.config.router import RouterConfig
from colm_serve.config.section import MAX_S, MIN_S
from colm_serve.config.sla import SlaClass, heavier_tpot_s
from colm_serve.config.standby import StandbyConfig
from colm_serve.config.tenant import TenantConfig
from colm_serve.config.tls import TlsConfig, check_bind_address
from colm_serve.config.worker import WorkerConfig
from colm_serve.config.yaml_file import load_yaml

__all__ = [
    "MAX_S",
    "MIN_S",
    "ClusterConfig",
    "DecodeConfig",
    "LimitsConfig",
    "PlannerConfig",
    "PrefillConfig",
    "RayConfig",
    "RouterConfig",
    "SlaClass",
    "SparseConfig",
    "SpeculationConfig",
    "StandbyConfig",
    "TenantConfig",
    "TlsConfig",
    "WorkerConfig",
    "check_bind_address",
    "heavier_tpot_s",
    "load_yaml",
]
