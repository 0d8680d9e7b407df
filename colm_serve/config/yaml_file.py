"""A YAML file read into a model, with errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from colm_serve.errors import InvalidConfig
from colm_serve.yaml_text import parse_yaml

Model = TypeVar("Model", bound=BaseModel)


def load_yaml(model: type[Model], name: str, path: Path) -> Model:
    """Read and check a YAML file; errors call the file `name`.

    Raises:
        InvalidConfig: not there, not YAML, an unknown key or a value that is not allowed.
    """
    try:
        raw = parse_yaml(path.read_text("utf-8"))
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


def _first_problem(error: ValidationError) -> InvalidConfig:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "config"
    value = problem.get("input")
    if key.startswith("tenants.") and "key" in key:
        value = "…"  # an API key is nothing to print
    shown = value if not isinstance(value, dict) else sorted(value)
    return InvalidConfig(key, shown, problem["msg"])
