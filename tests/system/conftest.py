"""A real cluster on Ray for the system tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from colm_serve.client import Client
from colm_serve.cluster.launch import Cluster
from colm_serve.config import ClusterConfig
from tests.helpers import make_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cluster_config(model_folder: Path) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": model_folder,
            "prefill": {"count": 2, "kv_tokens": 8192, "chunk_tokens": 128},
            "decode": {"count": 1, "kv_tokens": 16384, "local_prefill_tokens": 0},
            "standby": {"enabled": False},
            "ray": {"health_interval_s": 0.3},
        }
    )


@pytest.fixture(scope="module")
def cluster(cluster_config: ClusterConfig) -> Iterator[Cluster]:
    with Cluster(cluster_config) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.addresses.grpc) as client:
        yield client
