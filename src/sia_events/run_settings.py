"""Settings of a run as a person asks for them: changed by name, and told apart."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from sia_events.errors import Unusable
from sia_events.shared.events import RunSettings
from sia_events.trainer.backends import TRL_HAS


def merged(settings: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """`settings` with some changed, by name; "learning.lr" is the field `lr` of the setting `learning`.

    A field is set behind the setting that it is of, in whichever order the two are named.
    Raises Unusable naming the setting that is unknown, out of range or at odds with another.
    """
    values = settings.model_dump()
    known = _names(RunSettings)
    for name, value in sorted(changes.items(), key=lambda change: change[0].count(".")):
        if name not in known:
            raise Unusable(f"no setting {name!r}; {_nearest(name, known)}")
        values = _with(values, name.split("."), value)
    try:
        # As JSON: there what is to be a tuple is a list.
        made = RunSettings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise Unusable(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}") from error
    if made.learning.backend == "trl" and made.algorithm not in ("auto", *TRL_HAS):
        raise Unusable(
            f"learning.backend=trl: TRL has {', '.join(TRL_HAS)}, and no {made.algorithm}. Take one of these with "
            "--set algorithm=NAME, or auto, under which what TRL lacks is learned by ours"
        )
    if made.algorithm == "dpo" and made.learning.credit == "per-step":
        raise Unusable(
            "learning.credit=per-step: dpo compares whole attempts, so no call is credited for itself. Leave it at "
            "terminal, or take another --set algorithm=NAME"
        )
    return made


def differences(one: RunSettings, other: RunSettings) -> list[str]:
    """Names of the settings in which two runs differ."""
    return [name for name in RunSettings.model_fields if getattr(one, name) != getattr(other, name)]


def _nearest(name: str, known: Sequence[str]) -> str:
    """Which setting may have been meant; one beside it, where `name` is a field of a setting there is."""
    group, _, field = name.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
    if not beside:
        field, beside = name, {other: other for other in known}
    near = difflib.get_close_matches(field, beside, n=1)
    return f"did you mean {beside[near[0]]}?" if near else f"there are: {', '.join(beside.values())}"


def _with(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The values with the one at the end of the path changed."""
    name, *rest = path
    inner = values.get(name)
    return {**values, name: _with(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _names(model: type[BaseModel], within: str = "") -> list[str]:
    """The fields of a model and of the models in it, dotted."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(within + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _names(field.annotation, f"{within}{name}.")
    return names
