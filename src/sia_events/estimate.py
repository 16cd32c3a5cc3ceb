"""What a run will cost, told before it: its work by its settings, calls and tokens from earlier runs or assumed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sia_events.feedback_svc.decision import trainable
from sia_events.infra.clickhouse import LogUnavailable, QueryRefused
from sia_events.infra.providers.prices import pricing
from sia_events.infra.store_lock import StoreHeld
from sia_events.log_here import open_log
from sia_events.reading import look
from sia_events.roles import require_askable
from sia_events.shared.events import RunSettings
from sia_events.shared.ports import Log
from sia_events.shared.providers import FREE, split_model
from sia_events.shared.settings import Settings
from sia_events.shared.task import Task, find_task, split_sizes
from sia_events.starting import require_learnable, suited

Price = Callable[[str, Mapping[str, Any]], float | None]

REGISTERED = "type = 'TaskRegistered' AND JSONExtractString(data, 'task') = {task:String}"
OF_TASK = f"run IN (SELECT run FROM events WHERE {REGISTERED})"
CALLS = f"""
SELECT role, model, count() / uniqExact(run, key) AS calls, avg(prompt_tokens) AS prompt,
    avg(completion_tokens) AS completion
FROM model_calls FINAL WHERE {OF_TASK} AND error = '' GROUP BY role, model
"""
ATTEMPTS = f"""
SELECT JSONExtractString(data, 'split') AS split, avg(JSONExtractUInt(data, 'calls')) AS calls
FROM events FINAL WHERE {OF_TASK} AND type = 'ExecutionLogged' GROUP BY split
"""


@dataclass(frozen=True)
class Habit:
    """Model calls of a piece of work, and tokens of a call, on average. A piece is one writing or one choice."""

    calls: float
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True)
class Earlier:
    """What runs of the task did before: by role and model; and calls of an attempt, by split."""

    habits: Mapping[tuple[str, str], Habit] = field(default_factory=dict)
    attempts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One role's share. `usd` is None where nobody knows the model's price."""

    role: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    basis: str


@dataclass(frozen=True)
class Estimate:
    """Lines of the roles that hosted models play. `limit` is the run's own, in US dollars."""

    lines: tuple[Line, ...]
    rests_on: str
    limit: float | None = None

    @property
    def usd(self) -> float | None:
        costs = [line.usd for line in self.lines]
        return None if None in costs else round(sum(cost or 0.0 for cost in costs), 6)

    @property
    def passes_limit(self) -> bool:
        return self.limit is not None and sum(line.usd or 0.0 for line in self.lines) > self.limit


def as_object(estimate: Estimate) -> dict[str, Any]:
    """{usd, limit, passes_limit, lines, rests_on}, for JSON."""
    return {**asdict(estimate), "usd": estimate.usd, "passes_limit": estimate.passes_limit}


async def before(settings: Settings, task: str, name: str | None, wanted: RunSettings) -> Estimate | None:
    """The estimate of a run that is about to be opened; None where a run of that name is there already.

    Raises what starting the run would: TaskError for what is no task, Unusable for settings that cannot be had.
    """
    return (await before_each(settings, task, {name: wanted})).get(name)


async def before_each(
    settings: Settings, task: str, wanted: Mapping[str | None, RunSettings]
) -> Mapping[str | None, Estimate]:
    """As `before` for several runs of one task, by name; without those that are there already."""
    found = find_task(task)
    asked = {name: suited(found, each)[0] for name, each in wanted.items()}
    for each in asked.values():
        require_learnable(settings, each)
        if not settings.nats_url:
            require_askable(settings, each)
    roles = {name: hosted(settings, each) for name, each in asked.items()}
    if not any(roles.values()):
        return dict.fromkeys(asked, Estimate((), ""))
    known, earlier = await _earlier(settings, found.name)
    items, price = items_asked(found), pricing(settings.providers, settings.prices)
    return {
        name: estimate(each, roles[name], items, earlier, price) for name, each in asked.items() if name not in known
    }


def estimate(
    wanted: RunSettings, roles: Mapping[str, str], items: Mapping[str, int], earlier: Earlier, price: Price
) -> Estimate:
    """What the run costs when every candidate is written, runs on dev, and one a generation meets the gate.

    `roles` are the models to be counted, by role; `items` are those that an attempt on a split is asked.
    """
    lines: list[Line] = []
    work = pieces(wanted)
    for role, model in roles.items():
        if role == "target":
            each = {split: earlier.attempts.get(split, items.get(split, ASSUMED_ITEMS)) for split in attempts(wanted)}
            calls = sum(count * each[split] for split, count in attempts(wanted).items())
            seen = "calls of an attempt measured" if earlier.attempts else "one call an item assumed"
            habit = earlier.habits.get((role, model)) or ASSUMED_TARGET
        else:
            habit = earlier.habits.get((role, model)) or assumed_writer(wanted)
            calls, seen = work[role] * habit.calls, f"{work[role]} pieces of work"
        told = "measured" if (role, model) in earlier.habits else "assumed"
        per_call = f"{habit.prompt_tokens:,.0f} + {habit.completion_tokens:,.0f} tokens a call {told}"
        prompt, completion = round(calls * habit.prompt_tokens), round(calls * habit.completion_tokens)
        usd = price(model, {"prompt_tokens": prompt, "completion_tokens": completion})
        lines.append(Line(role, model, round(calls), prompt, completion, usd, f"{seen}, {per_call}"))
    plan = f"{wanted.generations} generations of {wanted.candidates} candidates"
    asked = (
        ", ".join(f"{split} {count}" for split, count in items.items())
        or f"{ASSUMED_ITEMS} assumed: none are told apart"
    )
    rests_on = (
        f"It rests on {plan}, items of an attempt ({asked}) and, where it says measured, earlier runs of the task; "
        "nothing tried again, nothing cached"
    )
    return Estimate(tuple(lines), rests_on, wanted.budget.usd)


# Of an attempt, on a task whose items cannot be counted.
ASSUMED_ITEMS = 100
ASSUMED_TARGET = Habit(calls=1, prompt_tokens=1_000, completion_tokens=500)


def assumed_writer(wanted: RunSettings) -> Habit:
    """A writer's calls where none was ever counted: one whole reply, or a loop that uses up its turns.

    A loop sends the conversation so far with every call: twice the prompt, on average.
    """
    if wanted.backend == "direct":
        return Habit(calls=1, prompt_tokens=wanted.prompt_tokens, completion_tokens=6_000)
    return Habit(calls=wanted.turns, prompt_tokens=2 * wanted.prompt_tokens, completion_tokens=1_500)


def attempts(wanted: RunSettings) -> Mapping[str, int]:
    """Attempts by split. Rollouts are not counted: only models of our own are learned from."""
    firsts = 1 if wanted.backend == "builtin" else wanted.candidates
    a_generation = 1 if wanted.lever == "weights" else wanted.candidates
    return {"dev": firsts + a_generation * wanted.generations, "gate": 1 + wanted.generations, "test": 2}


def pieces(wanted: RunSettings) -> Mapping[str, int]:
    """What LLM agents are asked: versions to write and, where the weights are ours to change, levers to choose."""
    choices = wanted.generations if wanted.lever == "auto" and trainable(wanted) else 0
    writings = 0 if wanted.lever == "weights" else wanted.candidates * wanted.generations
    return {"meta": wanted.candidates, "feedback": writings + choices}


def hosted(settings: Settings, wanted: RunSettings) -> Mapping[str, str]:
    """The roles whose models somebody bills."""
    cast = {"target": wanted.target_model}
    if wanted.backend != "builtin" and wanted.meta_model:
        cast |= {"meta": wanted.meta_model, "feedback": wanted.feedback_model or wanted.meta_model}

    def billed(model: str) -> bool:
        provider = settings.providers.get(split_model(model)[0])
        return provider is None or provider.kind not in FREE

    return {role: model for role, model in cast.items() if billed(model)}


def items_asked(task: Task) -> Mapping[str, int]:
    """Items of an attempt by split: on a plain task every attempt answers all. Empty where they cannot be counted.

    A kernel is one, however often it is timed.
    """
    sizes = split_sizes(task)
    if task.evaluator == "kernel":
        return dict.fromkeys(sizes, 1)
    if task.splits:
        return {split: sizes[split] for split in ("dev", "gate", "test")}
    return {split: sum(sizes.values()) for split in sizes}


async def _earlier(settings: Settings, task: str) -> tuple[tuple[str, ...], Earlier]:
    """The runs that the log has, and what those of the task did."""
    if not settings.log_dsn and not (settings.home / "log").exists():
        return (), Earlier()  # a first run: opening the log would make one

    async def ask(log: Log) -> tuple[tuple[str, ...], Earlier]:
        habits = {
            (row["role"], row["model"]): Habit(row["calls"], row["prompt"], row["completion"])
            for row in await log.query(CALLS, {"task": task})
        }
        attempted = {row["split"]: row["calls"] for row in await log.query(ATTEMPTS, {"task": task})}
        return tuple(await log.runs()), Earlier(habits, attempted)

    try:
        return await look(settings, ask, open_log)
    except (LogUnavailable, QueryRefused, StoreHeld):
        # No reason not to start: the run needs no log, and assumptions are said to be assumptions.
        return (), Earlier()
