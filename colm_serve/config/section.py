"""What every section of a configuration is: frozen, and unknown keys fail."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_S = 86400.0
#: Less is no time that anything here takes.
MIN_S = 1e-6
Seconds = Annotated[float, Field(gt=0, le=MAX_S)]
#: Of what a request may take.
TargetMs = Annotated[float, Field(ge=MIN_S * 1000, le=MAX_S * 1000)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A mapping of keys to values somewhere in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
