"""What the model calls of a run came to: counted by the log, summed here, and held against the run's budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from string import ascii_lowercase
from typing import Any

from sia_events.infra.clock import SystemClock
from sia_events.reading import as_it_stands, lineage, look, resolve
from sia_events.shared.calls import journal_key
from sia_events.shared.events import AttemptRequested, FeedbackRequested, RunStarted, WeightUpdateRequested
from sia_events.shared.oversight import active_minutes
from sia_events.shared.ports import Log
from sia_events.shared.record import IMPORTED, Record
from sia_events.shared.run import fold
from sia_events.shared.settings import Settings
from sia_events.shared.summary import whole

# Counted as the budget counts them: calls with a reply, whole or broken off. The sum of the dollars leaves out calls of
# models without a price; `unpriced` says how many those are.
CALLS = """
SELECT run, role, model, key, count() AS calls, sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion,
    sum(usd) AS dollars, countIf(JSONExtractRaw(body, 'usd') = 'null') AS unpriced
FROM model_calls FINAL
WHERE run IN {runs:Array(String)} AND (error = '' OR completion_tokens > 0)
GROUP BY run, role, model, key
ORDER BY run, role, model, key
"""


@dataclass(frozen=True)
class Calls:
    """The calls that one attempt of the target agent, or one writing of an LLM agent, made of one model."""

    run: str
    role: str
    model: str
    key: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    unpriced: int = 0


@dataclass(frozen=True)
class Sum:
    """`usd` is None as soon as one of the calls has no price; `priced_usd` is what the others cost."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    priced_usd: float
    unpriced_calls: int


async def cost(settings: Settings, run: str) -> dict[str, Any]:
    """`told`, of the run that has this name or alone begins so. Raises Unusable where there is none."""

    async def ask(log: Log) -> dict[str, Any]:
        history = await lineage(log, await resolve(log, run))
        rows = await log.query(CALLS, {"runs": sorted({record.run for record in history})})
        over = fold(history).status in ("finished", "cancelled")
        return told(history, [Calls(*row.values()) for row in rows], history[-1].time if over else _now())

    return await as_it_stands(settings, await look(settings, ask))


def told(history: Sequence[Record], calls: Iterable[Calls], now: datetime) -> dict[str, Any]:
    """{run, parent, task, status, own, inherited, budget}.

    `own` is {total, by_role, by_model, by_generation}, each a `Sum`. `inherited` is the same of what a branch shares
    with its parents: it was paid for by them, and stands against no limit of the branch. It is None for other runs.
    `budget` has {allowed, spent, left} a limit, None where there is no limit.
    """
    state, generations = fold(history), generations_of(history)
    dated = [(each, generations.get((each.run, _piece(each)))) for each in calls]
    own = [(each, generation) for each, generation in dated if each.run == state.name]
    shared = [(each, generation) for each, generation in dated if each.run != state.name and generation is not None]
    spent = total(each for each, _ in own)
    used: dict[str, float] = {
        "usd": spent.priced_usd,
        "minutes": round(active_minutes(history, now), 2),
        "tokens": spent.prompt_tokens + spent.completion_tokens,
        "calls": spent.calls,
    }
    limits = state.settings.budget.model_dump()
    return {
        "run": state.name,
        "parent": state.parent,
        "task": state.task.task if state.task else None,
        "status": state.status,
        "own": _sums(own),
        "inherited": _sums(shared) if state.parent else None,
        "budget": {name: _against(limits[name], amount) for name, amount in used.items()},
    }


async def summary(settings: Settings, history: Sequence[Record]) -> dict[str, Any]:
    """`whole`, with the cost by the calls themselves, as `cost` has it; `inherited` of it is what parents paid for.

    A candidate that was left out and an adapter's probes are in no record. Of an imported run only records are known.
    """
    found = await as_it_stands(settings, whole(history))
    if history[0].producer == IMPORTED:
        return found
    paid = await cost(settings, history[-1].run)
    parts = [part["total"] for part in (paid["own"], paid["inherited"]) if part]
    found["cost"] |= {**_spent(parts), "inherited": _spent(parts[1:]) if paid["inherited"] else None}
    return found


def _spent(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dollars = [part["usd"] for part in parts]
    return {
        "model_calls": sum(part["calls"] for part in parts),
        "tokens": sum(part["prompt_tokens"] + part["completion_tokens"] for part in parts),
        "usd": None if None in dollars else round(sum(dollars), 6),
    }


def generations_of(history: Sequence[Record]) -> dict[tuple[str, str], int]:
    """The generation that a piece of work was done for, by run and by what its calls are kept under.

    A train attempt is of the generation that learns from it, a sealed test of the last one. Pieces of a parent that
    came behind the fork are not in a branch's history, and so not here.
    """
    found: dict[tuple[str, str], int] = {}
    generation = 0
    for record in history:
        match record.event:
            case RunStarted():
                found[record.run, "meta.g0"] = 0
            case FeedbackRequested(generation=generation):
                found[record.run, f"feedback.g{generation}"] = generation
            case WeightUpdateRequested(generation=learning):
                found[record.run, f"trainer.g{learning}"] = learning
            case AttemptRequested(attempt=attempt):
                found[record.run, journal_key(attempt)] = generation
    return found


def total(calls: Iterable[Calls]) -> Sum:
    found = list(calls)
    priced, unpriced = round(sum(each.usd for each in found), 6), sum(each.unpriced for each in found)
    return Sum(
        calls=sum(each.calls for each in found),
        prompt_tokens=sum(each.prompt_tokens for each in found),
        completion_tokens=sum(each.completion_tokens for each in found),
        usd=None if unpriced else priced,
        priced_usd=priced,
        unpriced_calls=unpriced,
    )


def _piece(calls: Calls) -> str:
    # LLM agents have a journal a candidate, "feedback.g1b", and one for the choice of the lever, "feedback.g1".
    return calls.key if calls.role == "target" else calls.key.rstrip(ascii_lowercase)


def _sums(dated: Sequence[tuple[Calls, int | None]]) -> dict[str, Any]:
    def by(name: str, of: Callable[[Calls, int | None], Any]) -> list[dict[str, Any]]:
        kinds = sorted({of(*each) for each in dated}, key=lambda kind: (kind is None, kind))
        return [{name: kind, **asdict(total(c for c, g in dated if of(c, g) == kind))} for kind in kinds]

    return {
        "total": asdict(total(each for each, _ in dated)),
        "by_role": by("role", lambda calls, _: calls.role),
        "by_model": by("model", lambda calls, _: calls.model),
        "by_generation": by("generation", lambda _, generation: generation),
    }


def _against(allowed: float | None, spent: float) -> Mapping[str, float | None]:
    left = None if allowed is None else round(max(0.0, allowed - spent), 6)
    return {"allowed": allowed, "spent": spent, "left": left}


def _now() -> datetime:
    return SystemClock().now()
