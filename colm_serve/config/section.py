"""What every section of a configuration is: frozen, and unknown keys fail."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_S = 86400.0
Seconds = Annotated[float, Field(gt=0, le=MAX_S)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A mapping of keys to values somewhere in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
