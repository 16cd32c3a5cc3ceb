"""The verbs that tell what there is here, runs apart: tasks, events, what works on this machine."""

import json

import typer

from sia_events.terminal import DONE, FAILED, Json, say, settings, tell, wait_for


def schema(as_json: Json = True) -> None:
    """JSON Schema of every event, and the AsyncAPI description of the stream."""
    from sia_events.shared.schema import asyncapi

    say(json.dumps(asyncapi(), indent=2))


def doctor(as_json: Json = False) -> None:
    """What works here, what does not, and how to mend it."""
    from sia_events import doctor as checks
    from sia_events.views import tables

    found = wait_for(checks.examine(settings()))
    say(json.dumps({"checks": [vars(check) for check in found]}) if as_json else tables.doctor_text(found))
    raise typer.Exit(FAILED if any(check.status == "fail" for check in found) else DONE)


def tasks_list(as_json: Json = False) -> None:
    """The built-in tasks."""
    from sia_events.shared.task import find_task, known_tasks, split_sizes
    from sia_events.views import tables

    rows = [
        {"task": t.name, "title": t.title, "metric": t.metric, "splits": split_sizes(t)}
        for t in map(find_task, known_tasks())
    ]
    tell(rows, as_json, tables.tasks_table)


def tasks_check(task: str, as_json: Json = False) -> None:
    """Whether TASK, a name or a folder, is complete; says what is missing and where."""
    from sia_events.shared.task import find_task, split_sizes

    found = find_task(task)
    splits = split_sizes(found)
    told = {
        "task": found.name,
        "title": found.title,
        "metric": found.metric,
        "splits": splits,
        "path": str(found.path),
    }
    counts = ", ".join(f"{split} {n}" for split, n in splits.items()) or "its score would not be held out"
    tell(told, as_json, lambda _: f"{found.name}: complete; {counts}")
