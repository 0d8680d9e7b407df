"""The cluster's config: every wrong key or value is named with what is allowed."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from colm_serve.config import (
    ClusterConfig,
    DecodeConfig,
    SlaClass,
    check_bind_address,
    heavier_tpot_s,
)
from colm_serve.errors import InvalidConfig

KEY = "sk-secret-0123456789"
FULL = """
model: ../models/tiny
model_name: tiny
prefill: {count: 2, kv_tokens: 1000, page_size: 16, chunk_tokens: 64}
decode: {count: 3, max_rows: 8}
router: {host: 127.0.0.1, http_port: 8000}
default_sla_class: chat
sla_classes:
  chat: {ttft_ms: 200, tpot_ms: 20, min_level: 1, max_level: 3}
  batch: {}
"""


def load(folder: Path, text: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text, "utf-8")
    return ClusterConfig.load(path)


def test_a_file_is_read_and_defaults_filled_in(tmp_path: Path) -> None:
    config = load(tmp_path, FULL)
    assert (config.prefill.count, config.decode.count, config.decode.max_rows) == (2, 3, 8)
    assert config.prefill.num_pages == 63, "1000 tokens need 62.5 pages of 16"
    assert config.sla_classes["chat"] == SlaClass(ttft_ms=200, tpot_ms=20, max_level=3)
    assert config.decode.frame_timeout_s == DecodeConfig().frame_timeout_s
    assert config.tls is None


def test_more_drafts_than_greedy_text_allows_are_refused(tmp_path: Path) -> None:
    most = load(tmp_path, "model: m\ndecode: {speculation: {max_drafts: 14}}")
    assert most.decode.speculation.max_drafts == 14
    with pytest.raises(InvalidConfig, match=r"decode.speculation.max_drafts: 15 .*14"):
        load(tmp_path, "model: m\ndecode: {speculation: {max_drafts: 15}}")


def test_there_are_classes_without_any_config(tmp_path: Path) -> None:
    config = load(tmp_path, "model: m")
    assert config.sla_classes[config.default_sla_class] == SlaClass(), "no targets"
    interactive, batch = config.sla_classes["interactive"], config.sla_classes["batch"]
    assert interactive.ttft_ms is not None
    assert batch.ttft_ms is None
    assert batch.weight < SlaClass().weight < interactive.weight
    assert heavier_tpot_s(config.sla_classes) == {"default": 0.1, "batch": 0.1}
    assert heavier_tpot_s({"only": SlaClass(weight=0.5)}) == {}
    heavier = {"a": SlaClass(weight=3), "b": SlaClass(tpot_ms=50, weight=2), "c": SlaClass()}
    assert heavier_tpot_s(heavier) == {"b": math.inf, "c": 0.05}
    assert list(load(tmp_path, FULL).sla_classes) == ["chat", "batch"], "one's own replace them"


def test_the_model_path_counts_from_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir("/")
    assert load(tmp_path / "configs", FULL).model == tmp_path / "models" / "tiny"
    assert load(tmp_path, "model: /srv/m").model == Path("/srv/m")


def test_variants_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    config = load(tmp_path, "model: m\nvariants: {chat: tuned/chat, code: /srv/code}")
    assert config.variants == {"chat": tmp_path / "tuned" / "chat", "code": Path("/srv/code")}
    folders = [config.folder_of(name) for name in ("", "chat", "code")]
    assert folders == [tmp_path / "m", tmp_path / "tuned" / "chat", Path("/srv/code")]


def test_the_pattern_files_path_counts_from_the_files_folder(tmp_path: Path) -> None:
    sparse = "{selector: minference, pattern_file: patterns.json}"
    config = load(tmp_path, f"model: m\nprefill: {{sparse: {sparse}}}")
    assert config.prefill.sparse.pattern_file == tmp_path / "patterns.json"
    assert load(tmp_path, "model: m").prefill.sparse.pattern_file is None


def test_a_model_is_named_by_its_folder_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, "model: m/stdlib-air").served_name == "stdlib-air"
    assert load(tmp_path, "model: m/stdlib-air\nmodel_name: mine").served_name == "mine"


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("model: m\nprefil: {}", "prefil", "Extra inputs are not permitted"),
        ("model: m\nvariants: {m: x}", "variants", "'m' is.*another than the model's own, m"),
        ("model: m\nvariants: {'': x}", "variants", "'' is not allowed"),
        (
            "model: m\nvariants: {a: x}\nplanner: {enabled: true, max_decode: 2}",
            "planner.enabled",
            "True is not allowed; allowed: false where there are variants",
        ),
        ("model: m\ndecode: {max_row: 3}", "decode.max_row", "Extra inputs are not permitted"),
        ("model: m\ndecode: {max_rows: 0}", "decode.max_rows", "0 is not allowed.*or equal to 1"),
        ("model: m\ndecode: {max_rows: many}", "decode.max_rows", "'many' is not allowed.*integer"),
        ("model: m\nprefill: {page_size: 1.5}", "prefill.page_size", "1.5 is not allowed"),
        ("model: m\nprefill: {stall_timeout_s: .inf}", "prefill.stall_timeout_s", "86400"),
        ("model: m\nprefill: {stall_timeout_s: .nan}", "prefill.stall_timeout_s", "nan"),
        (
            "model: m\nplanner: {min_decode: 9}",
            "planner",
            "min_decode 9 is above max_decode 8",
        ),
        ("model: m\nplanner: {hysteresis: .inf}", "planner.hysteresis", "equal to 10"),
        ("model: m\nrouter: {http_port: 70000}", "router.http_port", "70000 is not.*65535"),
        ("model: m\ndecode: {weight_dtype: int4}", "decode.weight_dtype", "int4.*'int8'"),
        ("model: m\nprefill: {sparse: {selector: best}}", "prefill.sparse.selector", "'adaptive'"),
        ("model: m\nprefill: {sparse: {gamma: 1.5}}", "prefill.sparse.gamma", "1.5.*equal to 1"),
        ("model: m\nprefill: {sparse: {gamma: 0}}", "prefill.sparse.gamma", "0.*greater than 0"),
        ("model: m\nprefill: {sparse: {min_tokens: 0}}", "prefill.sparse.min_tokens", "0"),
        (
            "model: m\nprefill: {sparse: {selector: minference}}",
            "prefill.sparse",
            "pattern_file None with selector minference: minference needs one",
        ),
        (
            "model: m\nprefill: {sparse: {pattern_file: p.json}}",
            "prefill.sparse",
            "pattern_file p.json with selector none: .*the others read none",
        ),
        ("decode: {}", "model", "Field required"),
        ("model: m\ndefault_sla_class: x", "config", "default_sla_class 'x'.*'default'"),
        (
            "model: m\nsla_classes: {default: {min_level: 3, max_level: 2}}",
            "sla_classes.default",
            "min_level 3 is above max_level 2",
        ),
        ("model: m\nsla_classes: {default: {ttft_ms: 0}}", "sla_classes.default.ttft_ms", "0"),
        ("model: m\nsla_classes: {default: {weight: 0}}", "sla_classes.default.weight", "than 0"),
        (
            "model: m\nsla_classes: {default: {weight: .inf}}",
            "sla_classes.default.weight",
            "finite",
        ),
        ("model: m\ntls: {ca_file: a}", "tls.cert_file", "Field required"),
        ("model: m\ntenants: {a: {}}", "tenants.a.api_keys", "one key or more"),
        (
            f"model: m\ntenants: {{a: {{api_keys: [{KEY}], sla_classes: [gold]}}}}",
            "tenants.a.sla_classes",
            "'gold'.*sla_classes: batch, default",
        ),
        (
            f"model: m\ntenants: {{a: {{api_keys: [{KEY}]}}, b: {{api_keys: [{KEY}]}}}}",
            "tenants.b.api_keys[0]",
            "not one of a's",
        ),
        (
            f"model: m\ntenants: {{a: {{api_keys: [{KEY}], tokens_per_min: 0}}}}",
            "tenants.a.tokens_per_min",
            "0",
        ),
        ("model: m\nlimits: {max_prompts: 0}", "limits.max_prompts", "0"),
        ("model: m\nlimits: {max_body_bytes: 67108865}", "limits.max_body_bytes", "67108864"),
        ("model: m\nlimits: {max_words: 5}", "limits.max_words", "Extra"),
        (
            "model: m\nsla_classes: {default: {tpot_ms: 1.0e-320}}",
            "sla_classes.default.tpot_ms",
            "0.001",
        ),
        (
            "model: m\nsla_classes: {default: {ttft_ms: .inf}}",
            "sla_classes.default.ttft_ms",
            "86400000",
        ),
        ("- a list", "config", "a mapping of keys to values"),
        ("model: [", "config", "YAML"),
        ("", "config", "a mapping"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str, says: str) -> None:
    with pytest.raises(InvalidConfig, match=f"(?s){says}") as caught:
        load(tmp_path, text)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"missing\.yaml.*readable file"):
        ClusterConfig.load(tmp_path / "missing.yaml")


@pytest.mark.parametrize("room", ["prefill", "decode", "router"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_listening_beyond_loopback_needs_tls(tmp_path: Path, room: str, host: str) -> None:
    with pytest.raises(InvalidConfig, match=f"{room}.host: '{host}' is not allowed"):
        load(tmp_path, f"model: m\n{room}: {{host: '{host}'}}")


def test_with_tls_any_address_may_be_listened_on(tmp_path: Path) -> None:
    tls = "tls: {ca_file: ca.pem, cert_file: c.pem, key_file: k.pem}"
    config = load(tmp_path, f"model: m\ndecode: {{host: 0.0.0.0}}\n{tls}")
    assert config.decode.host == "0.0.0.0"
    assert config.tls is not None
    assert config.tls.ca_file == tmp_path / "ca.pem", "as every path, from the file's folder"
    assert (config.tls.cert_file, config.tls.key_file) == (tmp_path / "c.pem", tmp_path / "k.pem")


@pytest.mark.parametrize(
    "wrong", ["sk-secret", "sk-secret with spaces in it", "sha256:secret", "sk-secret" + "x" * 512]
)
@pytest.mark.parametrize("key", ["api_keys", "apikeys"])
def test_an_api_key_is_never_printed(tmp_path: Path, key: str, wrong: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, f"model: m\ntenants: {{a: {{{key}: [{wrong!r}]}}}}")
    assert caught.value.key == f"tenants.a.{key}"
    assert "secret" not in str(caught.value)


def test_an_api_key_is_never_shown(tmp_path: Path) -> None:
    config = load(tmp_path, f"model: m\ntenants: {{a: {{api_keys: [{KEY}]}}}}")
    assert "secret" not in repr(config)
    assert config.tenants["a"].key_digests() == (hashlib.sha256(KEY.encode()).digest(),)


def test_beyond_loopback_the_router_needs_tenants(tmp_path: Path) -> None:
    beyond = "model: m\nrouter: {host: 10.1.2.3}\n"
    beyond += "tls: {ca_file: ca.pem, cert_file: c.pem, key_file: k.pem}\n"
    with pytest.raises(InvalidConfig, match=r"tenants: {} .*API keys, once router.host"):
        load(tmp_path, beyond)
    load(tmp_path, f"{beyond}tenants: {{a: {{api_keys: [{KEY}]}}}}")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_needs_no_tls(host: str) -> None:
    check_bind_address("host", host, has_tls=False)


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, FULL)
    with pytest.raises(ValidationError, match="frozen"):
        config.decode.max_rows = 9
