"""The harness template: a typed spec of how to ask a model for a label, and the files that carry it out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, field
from importlib import resources
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sia_events.shared.task import Task

AGENT = "target_agent.py"
SPEC = "harness.json"


class NotATemplate(Exception):
    """A harness that was not made from the template, or no longer fits it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Spec:
    """How the template's agent asks for the label of an item.

    A prompt is `instruction`, a blank line and "`item`: text"; before it come solved `examples`, the same for all
    items ("fixed") or those with the most similar texts ("nearest"); `prefill` opens the model's answer. The answer is
    written by the model ("generate": up to `max_tokens`, the label's word read from it by `extraction`, asked again
    up to `retries` times when none is there) or picked among the `label_words` by log-probability ("choose"), with
    the bias towards a label removed that shows on `calibrate` unlabelled items. The majority of `votes` decides.

    `opening` and `plain_words` are the task's offers for `prefill` and `label_words`; only edits of a spec use them.
    """

    instruction: str
    item: str
    label_words: Mapping[str, str]
    examples: Annotated[int, Field(ge=0, le=32)] = 0
    example_choice: Literal["fixed", "nearest"] = "fixed"
    answer: Literal["generate", "choose"] = "generate"
    extraction: Literal["first_word", "anywhere", "last"] = "anywhere"
    prefill: str = ""
    calibrate: Annotated[int, Field(ge=0, le=512)] = 0
    votes: Annotated[int, Field(ge=1, le=15)] = 1
    retries: Annotated[int, Field(ge=0, le=5)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 8
    opening: str = "Answer:"
    plain_words: Mapping[str, str] = field(default_factory=dict)


_SPEC = TypeAdapter(Spec)


def naive_spec(task: Task) -> Spec:
    """Ask and read the answer: what a first agent does. Raises NotATemplate for a task without labels."""
    if not task.labels:
        raise NotATemplate(f"{task.path}: the template answers with labels, and task.toml states none.")
    return Spec(
        instruction=task.question,
        item=task.item,
        label_words={label: label for label in task.labels},
        opening=task.opening,
        plain_words=dict(task.words),
    )


def render(spec: Spec, task: Task) -> dict[str, bytes]:
    """The harness of `spec` as files by relative name. Raises NotATemplate when its labels are not the task's."""
    if set(spec.label_words) != set(task.labels) or len(set(spec.label_words.values())) != len(task.labels):
        raise NotATemplate(f"label_words must give each label of {task.name} a word of its own: {spec.label_words}")
    agent = resources.files("sia_events.feedback_svc").joinpath("template_agent.py").read_bytes()
    return {AGENT: agent, SPEC: (json.dumps(asdict(spec), indent=2) + "\n").encode()}


def read(tree: Mapping[str, bytes]) -> Spec:
    """The spec in a harness's files. Raises NotATemplate when there is none that fits."""
    try:
        return _SPEC.validate_json(tree[SPEC])
    except KeyError as error:
        raise NotATemplate(f"no {SPEC} among {', '.join(sorted(tree))}") from error
    except ValidationError as error:
        raise NotATemplate(f"{SPEC}: {error}") from error


def digest(spec: Spec) -> str:
    """Lower-case hex SHA-256 of the spec: equal for equal specs, whatever the order of their label words."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()
