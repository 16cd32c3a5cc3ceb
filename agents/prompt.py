"""Builds what the meta- and the feedback-agent read, from files in prompts/; pure over what was loaded."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template

from sia_events.agents import lineage
from sia_events.agents.check import ENTRY
from sia_events.agents.evidence import Attempt, choose
from sia_events.agents.fit import Part, Section, cut, fenced, fit
from sia_events.agents.measured import HEAD as KERNELS_HEAD
from sia_events.agents.measured import kernels
from sia_events.agents.trajectory import ITEMS_HEAD, bad_items, outcomes, trajectories
from sia_events.shared.events import Evidence, Lever
from sia_events.shared.ports import Limits
from sia_events.shared.record import Record
from sia_events.shared.run import Run
from sia_events.shared.task import Task

PYTHON = "3.11 or later"


@dataclass(frozen=True)
class Prompt:
    """A built prompt. `digest` is the SHA-256 of its text in UTF-8: the name of its blob, once it is stored.

    `omitted` has a line for everything that was left out to stay within the budget; the text says the same.
    `references` are the records that the text shows, position to id.
    """

    text: str
    digest: str
    omitted: tuple[str, ...]
    references: Mapping[int, str] = field(default_factory=dict)


def meta_prompt(
    task: Task,
    model: str,
    data_summary: str,
    reference: Mapping[str, bytes],
    examples: Sequence[str],
    budget_tokens: int,
) -> Prompt:
    """What the meta-agent reads to write a first version; `model` is the target agent's.

    `data_summary` is `summarise` of the public files, `reference` the reference agent's tree, `examples` are other
    tasks' descriptions. The answer's form is the backend's to add. Raises ValueError where the budget is too small for
    the fixed words.
    """
    sections = {
        "description": _description(task, 0.3),
        "reference": Section("files of the reference agent", 0.4, _files(reference)),
        "data": Section("files of public data", 0.15, [Part(data_summary, "the data summary")]),
        "examples": Section(
            "other tasks",
            0.15,
            [Part(fenced(text), f"task {n}", n) for n, text in enumerate(examples, 1)],
            empty="There is no other task here.",
        ),
    }
    return _built("meta.md", _task_words(task, model), sections, budget_tokens, ())


def feedback_prompt(
    run: Run,
    records: Sequence[Record],
    task: Task,
    harness: Mapping[str, bytes],
    attempt: Attempt,
    budget_tokens: int,
    usd_spent: float | None = None,
) -> Prompt:
    """What the feedback-agent reads to write a candidate with another harness.

    `run` is the fold of `records`, `harness` the incumbent's tree and `attempt` its last scored attempt on dev. All
    of it is a function of the log up to the cause, so a repeated handler asks the same and gets the recorded reply; a
    `usd_spent` has to be that too. Raises ValueError where the budget is too small for the fixed words.
    """
    fixed = {
        **_task_words(task, run.versions[attempt.version].weights.model),
        **_run_words(run, records, attempt, usd_spent),
    }
    sections = {
        "steering": _steering(run),
        "description": _description(task, 0.12),
        "code": Section("files of the incumbent", 0.35, _files(harness)),
        **_log_sections(run, records, attempt),
    }
    return _built("feedback.md", fixed, sections, budget_tokens, records)


def decision_prompt(
    run: Run,
    records: Sequence[Record],
    task: Task,
    attempt: Attempt,
    evidence: Evidence,
    allowed: Mapping[Lever, Mapping[str, str]],
    budget_tokens: int,
    usd_spent: float | None = None,
) -> Prompt:
    """What the feedback-agent reads to choose a lever; it states the form of the reply too.

    `allowed` maps each lever that may be chosen to its algorithms, none for the harness, and to when each is apt. The
    gains that `evidence` has from the gate are not shown. Otherwise as `feedback_prompt`.
    """
    fixed = {
        **_task_words(task, run.versions[attempt.version].weights.model),
        **_run_words(run, records, attempt, usd_spent),
        "allowed": "\n".join(_choice(lever, algorithms) for lever, algorithms in allowed.items()),
        "figures": _figures(evidence),
    }
    sections = {
        "steering": _steering(run),
        "description": _description(task, 0.2),
        **_log_sections(run, records, attempt),
    }
    return _built("decision.md", fixed, sections, budget_tokens, records)


def _built(
    name: str, fixed: Mapping[str, str], sections: Mapping[str, Section], budget: int, records: Sequence[Record]
) -> Prompt:
    fitted = fit(_template(name), fixed, sections, budget)
    ids = {record.position: str(record.id) for record in records}
    return Prompt(
        text=fitted.text,
        digest=hashlib.sha256(fitted.text.encode()).hexdigest(),
        omitted=fitted.omitted,
        references={position: ids[position] for position in sorted(fitted.records & ids.keys())},
    )


def _template(name: str) -> Template:
    return Template((resources.files("sia_events.agents") / "prompts" / name).read_text(encoding="utf-8"))


def _task_words(task: Task, model: str) -> dict[str, str]:
    sizes = task.splits
    whole = (
        "There are no items: every attempt is measured anew, on inputs drawn then."
        if task.evaluator == "kernel"
        else "There is one set of items, and nothing is held out."
    )
    splits = (
        f"Items are dealt into splits that share none: train (its answers are open), dev ({sizes.dev} items), gate "
        f"({sizes.gate}) and a sealed test ({sizes.test}). Dev gives feedback; gate and test decide."
        if sizes
        else whole
    )
    return {
        "title": cut(task.title, 200),
        "model": cut(model, 100),
        "metric": cut(task.metric, 60),
        "direction": f"{task.direction}d",
        "floor": f" (one constant answer scores {task.floor:g})" if task.floor is not None else "",
        "splits": splits,
        "contract": _template("contract.md").substitute(python=PYTHON, limits=_limits(task.limits)).strip(),
    }


def _limits(limits: Limits) -> str:
    return (
        f"{limits.wall_s:g} s of wall time, {limits.cpu_s:g} s of CPU, {limits.memory_mb} MB of memory, "
        f"{limits.processes} processes, {limits.file_mb} MB a file"
    )


def _run_words(run: Run, records: Sequence[Record], attempt: Attempt, usd: float | None) -> dict[str, str]:
    return {
        "incumbent": attempt.version,
        "generation": str(run.generation),
        "dev_items": str(len(attempt.feedback)),
        "levers": lineage.levers(run, records),
        "remaining": lineage.remaining(run, records, usd),
    }


def _log_sections(run: Run, records: Sequence[Record], attempt: Attempt) -> dict[str, Section]:
    """Lineage, dev items and trajectories; a regression is told by the parent's scores on the same items."""
    parent = run.versions[attempt.version].parent
    before = run.scored(parent, "dev") if parent else ()
    sign = 1.0 if run.task is None or run.task.maximize else -1.0
    earlier = [sign * score for score in before[-1].items] if before else None
    chosen = choose(attempt, earlier, parent or "")
    return {
        "versions": Section("versions", 0.13, lineage.versions(run, records), head=lineage.HEAD, between="\n"),
        "barren": Section(
            "generations without a candidate", 0.03, lineage.barren(records), head="\n\n", between="\n", empty=""
        ),
        "classes": Section("summaries of dev", 0.05, outcomes(attempt), between="\n"),
        "trajectories": Section("trajectories", 0.25, trajectories(attempt, chosen)),
        "items": _items(run, records, attempt),
    }


def _items(run: Run, records: Sequence[Record], attempt: Attempt) -> Section:
    """What went badly; where kernels are measured, what the bench says of them."""
    if measured := kernels(run, records, attempt.version):
        return Section("kernels measured", 0.12, measured, KERNELS_HEAD, "\n")
    empty = "None that can be told by itself."
    return Section("items that went badly", 0.12, bad_items(attempt), ITEMS_HEAD, "\n", empty=empty)


def _description(task: Task, share: float) -> Section:
    return Section("task descriptions", share, [Part(fenced(task.description.strip(), "markdown"), "the task")])


def _files(tree: Mapping[str, bytes]) -> list[Part]:
    """The tree's files as parts: the entry point first, then the small ones."""
    ordered = sorted(tree, key=lambda path: (path != ENTRY, len(tree[path]), path))
    return [Part(_file(path, tree[path]), path, place) for place, path in enumerate(ordered)]


def _file(path: str, body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return f"`{path}`: {len(body):,} bytes, no text."
    return f"`{path}`:\n" + fenced(text.rstrip("\n"), "python" if path.endswith(".py") else "")


def _steering(run: Run) -> Section:
    """What people said, the latest word first in line for room and last on the page."""
    said = list(enumerate(run.steering, 1))
    parts = [Part(f"{n}. {text.strip()}", f"word {n}", n) for n, text in reversed(said)]
    return Section("words of steering", 0.1, parts, between="\n", empty="Nothing so far.")


def _choice(lever: Lever, algorithms: Mapping[str, str]) -> str:
    lines = [f"- `{lever}`" + (", with one `algorithm` of these" if algorithms else "")]
    return "\n".join([*lines, *(f"  - `{name}`: {apt}" for name, apt in algorithms.items())])


def _figures(evidence: Evidence) -> str:
    score = "none" if evidence.dev_score is None else f"{evidence.dev_score:.3f}"
    of = "dev items" if evidence.rewards_of == "dev" else "rollouts on train"
    lines = [
        f"- incumbent {evidence.incumbent}, dev score {score}",
        f"- answers on dev that are missing or invalid: {evidence.invalid_rate:.1%}",
        f"- share of the commonest answer: {evidence.skew:.1%}",
    ]
    if evidence.rewards:
        lines.append(f"- {of} by tenth of the score, worst first: {' '.join(map(str, evidence.rewards))}")
    if evidence.reward_skew is not None:
        lines.append(f"- skewness of the scores of {of}: {evidence.reward_skew:+.2f}")
    if evidence.calls_an_item is not None:
        lines.append(f"- model calls an item: {evidence.calls_an_item:.1f}")
    lines += [
        f"- generations tried: harness {evidence.harness_tries}, weights {evidence.weights_tries}",
        f"- generations left, this one included: {evidence.generations_left}",
    ]
    for lever, seconds in evidence.seconds_of.items():
        usd = evidence.usd_of.get(lever)
        paid = "an unknown amount" if usd is None else f"{usd:.2f} USD"
        lines.append(f"- a generation of the {lever} took {seconds:.0f} s and {paid}")
    return "\n".join(lines)
