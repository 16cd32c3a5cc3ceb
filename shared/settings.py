"""Settings of a process, read once at the door: SIA_* variables over one TOML file over the defaults."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from sia_events.shared.providers import BUILT_IN, Price, Provider, ProviderName, Roles, built_in

TABLES = ("providers", "roles", "prices")
ROLES = ("meta", "feedback", "target")
OF_PROVIDER = ("base_url", "key_env", "concurrency")


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
    trainer_usd_per_hour: float | None = Field(
        default=None, gt=0, description="USD an hour that the machine which learns costs; unset: it is one's own"
    )
    patience_s: float = Field(
        default=120.0, gt=0, description="seconds for which a model provider that is away is asked again"
    )
    drain_s: float = Field(
        default=20.0, ge=0, description="seconds for which an ending gateway waits for replies that are under way"
    )
    partitions: int = Field(
        default=1,
        ge=1,
        le=64,
        description="streams that records are spread over by run, and as many for traces",
    )
    events_gb: float | None = Field(
        default=None, gt=0, description="GiB that the streams of records may take; unset: 2 at least"
    )
    trace_gb: float | None = Field(
        default=None, gt=0, description="GiB that the streams of traces may take; unset: 8 at least"
    )
    trace_days: int | None = Field(
        default=None, ge=1, description="days after which traces go, from streams and tables; unset: never"
    )
    trace_table_days: int | None = Field(
        default=None,
        ge=0,
        description="the same for tables alone, no fewer than streams have; 0: never; unset: as streams have",
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="where sia serve answers /metrics, on loopback; unset: nowhere"
    )
    debug: bool = Field(default=False, description="tracebacks instead of one-line errors")
    providers: Mapping[ProviderName, Provider] = Field(
        default_factory=built_in, description="who answers model calls, by the first part of a model's name"
    )
    roles: Roles = Field(default=Roles(), description="models of the roles that a run names none for")
    prices: Mapping[str, Price] = Field(
        default_factory=dict, description="USD per million tokens, over the prices that come with the package"
    )

    @field_validator("trace_table_days")
    @classmethod
    def _no_fewer_than_streams(cls, days: int | None, given: ValidationInfo) -> int | None:
        """What a stream has and the tables lack is taken for lost, so tables keep a trace for as long at least."""
        of_streams = given.data.get("trace_days")
        if days and (of_streams is None or days < of_streams):
            kept = "for ever" if of_streams is None else f"for {of_streams} days"
            raise ValueError(f"the streams keep traces {kept} (SIA_TRACE_DAYS), and tables are to keep them as long")
        return days

    @property
    def days_in_tables(self) -> int | None:
        """For how many days tables keep a trace; None: for ever."""
        return self.trace_days if self.trace_table_days is None else self.trace_table_days or None


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read SIA_* variables, and `config.toml` under SIA_HOME (or the file SIA_CONFIG names). Raises SettingsError."""
    named = {
        name: environ[f"SIA_{name.upper()}"]
        for name in Settings.model_fields
        if name not in TABLES and environ.get(f"SIA_{name.upper()}")
    }
    home = Path(named.get("home", Settings.model_fields["home"].default)).expanduser().absolute()
    file = Path(environ.get("SIA_CONFIG", home / "config.toml"))
    values: dict[str, Any] = {}
    try:
        if file.exists():
            values = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: {error}; mend or remove the file") from error
    origins = {(name,): f"SIA_{name.upper()}" for name in named}
    tables = _tables(values, environ, origins, file)
    try:
        return Settings.model_validate({**values, **named, **tables, "home": home})
    except ValidationError as error:
        first = error.errors()[0]
        where = tuple(str(part) for part in first["loc"] if part != "[key]")
        place = next(
            (origins[where[:n]] for n in range(len(where), 0, -1) if where[:n] in origins), f"{file}: {'.'.join(where)}"
        )
        raise SettingsError(f"{place}: {first['msg']}") from error


def _tables(
    values: Mapping[str, Any], environ: Mapping[str, str], origins: dict[tuple[str, ...], str], file: Path
) -> Mapping[str, Any]:
    """The providers and roles, from variables over the file over what is built in; `origins` learns the variables'."""
    for name in TABLES:
        rows = values.get(name, {})
        if not isinstance(rows, dict):
            raise SettingsError(f"{file}: {name}: a table belongs there, not {rows!r}")
        for key, row in rows.items() if name != "roles" else ():
            if not isinstance(row, dict):
                raise SettingsError(f"{file}: {name}.{key}: a table belongs there, not {row!r}")
    written = values.get("providers", {})
    providers = {name: {**BUILT_IN.get(name, {}), **written.get(name, {})} for name in (*BUILT_IN, *written)}
    for variable, value in _variables(environ, "SIA_PROVIDER_"):
        provider, field = _provider_field(variable, providers)
        providers[provider][field] = value
        origins["providers", provider, field] = variable
    roles = dict(values.get("roles", {}))
    for role in ROLES:
        if value := environ.get(f"SIA_{role.upper()}_MODEL"):
            roles[role] = value
            origins["roles", role] = f"SIA_{role.upper()}_MODEL"
    return {"providers": providers, "roles": roles}


def _variables(environ: Mapping[str, str], prefix: str) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in environ.items() if name.startswith(prefix) and value)


def _provider_field(variable: str, providers: Mapping[str, Any]) -> tuple[str, str]:
    """What SIA_PROVIDER_<NAME>_<FIELD> is about. Raises SettingsError where there is no such provider or field."""
    for provider in providers:
        for field in OF_PROVIDER:
            if variable == f"SIA_PROVIDER_{provider.upper().replace('-', '_')}_{field.upper()}":
                return provider, field
    fields = ", ".join(field.upper() for field in OF_PROVIDER)
    raise SettingsError(
        f"{variable}: no such setting; it is SIA_PROVIDER_<NAME>_ and one of {fields}, "
        f"and the providers are {', '.join(providers)}"
    )
