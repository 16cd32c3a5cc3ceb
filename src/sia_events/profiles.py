"""SIA's JSON profiles and providers, read by name or path, and its bundled tasks, found by name."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sia_events.sia_spelling import ALIASES, META, PROVIDERS, TARGET, Misspelt, named

KINDS = {"meta": "profile", "target": "profile", "provider": "provider"}
DOCS = "docs/coming-from-sia.md"
M = TypeVar("M", bound=BaseModel)
Text = Annotated[str, Field(min_length=1)]


class Provider(BaseModel):
    """A provider file of SIA's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider_id: Text
    name: Text
    client_kind: Literal["anthropic", "openai", "google"]
    base_url: Text | None = None
    api_key_env: Text
    litellm_prefix: Text | None = None


class _Reference(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text
    entrypoint: Text | None = None


class _Meta(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    profile_id: Text
    name: Text
    agent_impl: Literal["claude", "openhands", "pydantic-ai"]
    model: Text
    provider_id: Text
    model_canonical_name: Text | None = None


class _Target(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    profile_id: Text
    name: Text
    model: Text
    provider_id: Text
    agent_reference: Literal["default"] | _Reference = "default"


@dataclass(frozen=True)
class Profile:
    """A profile in our words: `model` is provider/model; `backend` is SIA's agent_impl, empty for a target agent.

    `reference` is the first agent's path and program, or None for the task's own. `own` says whether the provider's
    file is the user's and not one of the package's.
    """

    model: str
    provider: Provider | None
    backend: str = ""
    reference: tuple[str, str | None] | None = None
    own: bool = False


@dataclass(frozen=True)
class Places:
    """Where SIA's files are looked for: folders of the user's, then those that its package brings, where installed."""

    profiles: Path
    providers: Path
    tasks: Path | None
    package: Path | None


def places(environ: Mapping[str, str] = os.environ) -> Places:
    """SIA's own rules: SIA_PROFILES_DIR or ./profiles, SIA_PROVIDERS_DIR or ./providers; for tasks SIA_TASKS_DIR."""
    tasks = environ.get("SIA_TASKS_DIR")
    return Places(
        Path(environ.get("SIA_PROFILES_DIR") or "profiles"),
        Path(environ.get("SIA_PROVIDERS_DIR") or "providers"),
        Path(tasks) if tasks else None,
        _package(Path(tasks) if tasks else None),
    )


def find_bundled(name: str, places: Places) -> str:
    """The folder of SIA's task of that name. Raises Misspelt."""
    roots = [root for root in (places.tasks, places.package and places.package / "tasks") if root]
    names = sorted({f.name for root in roots if root.is_dir() for f in root.iterdir() if (f / "data").is_dir()})
    for root in roots:
        if name in names and (root / name / "data").is_dir():
            return str((root / name).resolve())
    if not names:
        raise Misspelt(
            f"--task {name}: SIA's tasks come with its package, whose command is called sia too, so put it aside: "
            "pip install --no-deps --target FOLDER sia-agent==0.6.0, and set SIA_TASKS_DIR=FOLDER/sia/tasks. "
            "Or give the task's own folder as --task_dir"
        )
    raise Misspelt(f"--task {name}: no such task{_near(name, names)}; there are: {', '.join(names)}")


def read_meta(name_or_path: str, places: Places) -> Profile:
    """A profile of the meta- and feedback-agent. Raises Misspelt naming file and field."""
    if name_or_path == META and not _found(META, "meta", places):
        return Profile(named("haiku", "anthropic"), None, "claude")
    file, found = _read(name_or_path, "meta", _Meta, places)
    place, provider = _read(found.provider_id, "provider", Provider, places)
    if found.agent_impl == "claude" and provider.client_kind != "anthropic":
        raise Misspelt(f"{file}: agent_impl claude speaks to providers of client_kind anthropic only")
    return Profile(named(found.model, found.provider_id), provider, found.agent_impl, own=_own(place, places))


def read_target(name_or_path: str, places: Places) -> Profile:
    """A profile of the target agent. Raises Misspelt naming file and field."""
    if name_or_path == TARGET and not _found(TARGET, "target", places):
        return Profile(named(ALIASES["haiku"], "anthropic"), None)
    file, found = _read(name_or_path, "target", _Target, places)
    reference = None
    if isinstance(found.agent_reference, _Reference):
        source = (file.parent / found.agent_reference.source).resolve()
        if not source.exists():
            raise Misspelt(f"{file}: agent_reference.source: {source} is not there")
        reference = str(source), found.agent_reference.entrypoint if source.is_dir() else None
    place, provider = _read(found.provider_id, "provider", Provider, places)
    model = named(found.model, found.provider_id)
    return Profile(model, provider, reference=reference, own=_own(place, places))


def table_row(provider: Provider) -> tuple[str, dict[str, str]]:
    """Our name for the provider, and its row of the table `[providers.NAME]`."""
    name = PROVIDERS.get(provider.provider_id, provider.provider_id)
    stated = {"kind": provider.client_kind, "base_url": provider.base_url, "key_env": provider.api_key_env}
    return name, {field: value for field, value in stated.items() if value}


def as_toml(name: str, row: Mapping[str, str]) -> str:
    """The row as it stands in the file of settings, on one line."""
    return f"providers.{name} = {{ {', '.join(f'{field} = {json.dumps(value)}' for field, value in row.items())} }}"


def _read(name_or_path: str, kind: str, model: type[M], places: Places) -> tuple[Path, M]:
    file = _found(name_or_path, kind, places)
    if file is None:
        known = sorted({f.stem for folder in _folders(kind, places) if folder.is_dir() for f in folder.glob("*.json")})
        there = f"; there are: {', '.join(known)}" if known else f"; none are installed ({DOCS})"
        raise Misspelt(f"no {KINDS[kind]} {name_or_path!r}{_near(name_or_path, known)}{there}, or give a .json file")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        return file, model.model_validate(body, strict=True)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Misspelt(f"{file}: does not read as JSON: {error}") from error
    except ValidationError as error:
        raise Misspelt(f"{file}: {_problem(error, model)}") from error


def _problem(error: ValidationError, model: type[BaseModel]) -> str:
    # Of the two forms of agent_reference the one with fields is what an object was meant to be.
    first: Any = max(error.errors(), key=lambda each: len(each["loc"]))
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("literal", "_")))
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return f"unknown field {field!r}{_near(field, known)}; known: {', '.join(known)}"
    given = "" if first["type"] == "missing" else f", not {first['input']!r}"
    return f"{field or 'the whole'}: {first['msg']}{given}"


def _found(name_or_path: str, kind: str, places: Places) -> Path | None:
    if name_or_path.endswith(".json") or "/" in name_or_path:
        return Path(name_or_path) if Path(name_or_path).is_file() else None
    files = (folder / f"{name_or_path}.json" for folder in _folders(kind, places))
    return next((file for file in files if file.is_file()), None)


def _folders(kind: str, places: Places) -> list[Path]:
    if kind == "provider":
        own, bundled = places.providers, "providers"
    else:
        own, bundled = places.profiles, "profiles"
    return [own, *([places.package / "defaults" / bundled] if places.package else [])]


def _package(tasks: Path | None) -> Path | None:
    """Where SIA's package is, installed or unpacked around `tasks`; it is looked at and never imported."""
    found = find_spec("sia")
    candidates = [tasks.parent if tasks else None, Path(found.origin).parent if found and found.origin else None]
    return next((folder for folder in candidates if folder and (folder / "defaults").is_dir()), None)


def _own(file: Path, places: Places) -> bool:
    return places.package is None or not file.resolve().is_relative_to(places.package)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
