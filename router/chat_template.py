"""Chat templates as transformers renders them, in a sandbox: they come from a model folder."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from colm_serve.errors import CheckpointError


def chat_template(source: str | list[dict[str, str]] | None) -> Template | None:
    """Compile a template; of several named ones, the default.

    Raises:
        CheckpointError: it is not a Jinja template.
    """
    if isinstance(source, list):
        source = {named["name"]: named["template"] for named in source}.get("default")
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError(f"chat_template: not a Jinja template: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own would escape what HTML reserves."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
