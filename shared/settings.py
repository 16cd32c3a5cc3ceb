"""Settings of a process, read once at the door: SIA_* variables over one TOML file over the defaults."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and where it was read."""


class Settings(BaseModel):
    """Where things are kept and which outside parts are used. Everything a run decides on is in RunSettings instead."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(default=Path("~/.sia"), description="all that a machine keeps: streams, tables, blobs, models")
    nats_url: str | None = Field(default=None, description="an outside NATS server; unset: one of our own")
    log_dsn: str | None = Field(default=None, description="clickhouse://user:password@host:port/database; unset: chDB")
    blobs_url: str | None = Field(
        default=None, description="an object store URL such as s3://bucket/prefix; unset: a folder"
    )
    gateway_secret: str | None = Field(
        default=None, description="signs attempt tokens where services are on several machines"
    )
    side_by_side: int = Field(
        default=3, ge=1, le=26, description="candidates of a generation that are tried at the same time"
    )
    model_threads: int = Field(default=2, ge=1, le=64, description="threads of the embedded model and of training")
    debug: bool = Field(default=False, description="tracebacks instead of one-line errors")


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read SIA_* variables, and `config.toml` under SIA_HOME (or the file SIA_CONFIG names). Raises SettingsError."""
    named = {
        name: environ[f"SIA_{name.upper()}"] for name in Settings.model_fields if environ.get(f"SIA_{name.upper()}")
    }
    home = Path(named.get("home", Settings.model_fields["home"].default)).expanduser().absolute()
    file = Path(environ.get("SIA_CONFIG", home / "config.toml"))
    values: dict[str, Any] = {}
    try:
        if file.exists():
            values = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: {error}; mend or remove the file") from error
    try:
        return Settings.model_validate({**values, **named, "home": home})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        place = f"SIA_{name.upper()}" if name in named else f"{file}: {name}"
        raise SettingsError(f"{place}: {first['msg']}") from error
