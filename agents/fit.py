"""Fits a prompt into its budget of tokens: what matters most goes in first, and what is left out is said."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template

CHARS_PER_TOKEN = 3.5
LEAST_CUT = 400
NAMED = 6


def tokens(text: str) -> int:
    """Tokens of a text, counted without any model's tokenizer: one for each 3.5 characters, rounded up.

    English prose and code come to about 4 characters a token, so the count errs on the large side there.
    """
    return math.ceil(len(text) / CHARS_PER_TOKEN)


@dataclass(frozen=True)
class Part:
    """A stretch of a section that goes in whole, unless it is the section's first and too long: then it is cut.

    `name` is what it is called when it is left out, `place` where it stands among the parts that stay, `records` the
    positions of the records that it shows.
    """

    text: str
    name: str
    place: int = 0
    records: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """A variable stretch of a prompt: its parts, the most important first.

    `share` is the fraction of the room that it may take while others want it; `what` are its parts in the plural.
    """

    what: str
    share: float
    parts: Sequence[Part]
    head: str = ""
    between: str = "\n\n"
    empty: str = "None."


@dataclass(frozen=True)
class Fitted:
    """The text, what was left out of it (a line a section or cut part), and the positions of the records it shows."""

    text: str
    omitted: tuple[str, ...]
    records: frozenset[int]


def fit(template: Template, fixed: Mapping[str, str], sections: Mapping[str, Section], budget_tokens: int) -> Fitted:
    """Fill the template with `fixed` as it stands and with as much of the sections as the budget has room for.

    The template's own placeholder `omitted` gets a list of what is not there. Raises ValueError where the fixed words
    alone exceed the budget.
    """
    limit = math.floor(budget_tokens * CHARS_PER_TOKEN)
    needs = {name: _size(section, section.parts) for name, section in sections.items()}
    room = min(limit, sum(needs.values()))
    while True:
        allowed = _allowances(needs, {name: section.share for name, section in sections.items()}, room)
        filled = {name: _fill(section, allowed[name]) for name, section in sections.items()}
        omitted = tuple(line for one in filled.values() for line in one.omitted)
        texts = {name: one.text for name, one in filled.items()}
        text = template.substitute({**fixed, **texts, "omitted": _stated(omitted, budget_tokens)})
        if len(text) <= limit:
            return Fitted(text, omitted, frozenset().union(*(one.records for one in filled.values())))
        if room == 0:
            raise ValueError(
                f"the fixed words of a prompt take {tokens(text)} tokens and its budget is {budget_tokens}: "
                "nothing was asked. Raise the setting prompt_tokens."
            )
        room = max(0, room - (len(text) - limit))


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` characters: what is taken out of its middle is said in its place."""
    if len(text) <= limit:
        return text
    kept = limit - len(_mark(len(text)))
    if kept <= 0:
        return text[:limit]
    head = kept * 2 // 3
    return text[:head] + _mark(len(text) - kept) + text[len(text) - (kept - head) :]


def fenced(text: str, language: str = "") -> str:
    """`text` between fences that it cannot close itself."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _mark(characters: int) -> str:
    return f"\n[… {characters:,} characters left out …]\n"


def _size(section: Section, parts: Sequence[Part]) -> int:
    return len(section.head) + sum(len(part.text) + len(section.between) for part in parts)


def _allowances(needs: Mapping[str, int], shares: Mapping[str, float], room: int) -> dict[str, int]:
    """Characters for each section: its share at most, and then of what others left, the first section first."""
    given = {name: min(need, int(shares[name] * room)) for name, need in needs.items()}
    left = room - sum(given.values())
    for name, need in needs.items():
        more = max(0, min(need - given[name], left))
        given[name] += more
        left -= more
    return given


def _fill(section: Section, allowed: int) -> Fitted:
    if not section.parts:
        return Fitted(section.empty, (), frozenset())
    kept: list[Part] = []
    gone: list[Part] = []
    omitted: list[str] = []
    left = allowed - len(section.head)
    for part in section.parts:
        if len(part.text) + len(section.between) > left and not kept and left >= LEAST_CUT:
            short = replace(part, text=cut(part.text, left - len(section.between)))
            omitted.append(f"{part.name}: {len(part.text) - len(short.text):,} of {len(part.text):,} characters")
            part = short
        if len(part.text) + len(section.between) > left:
            gone.append(part)
            continue
        kept.append(part)
        left -= len(part.text) + len(section.between)
    if gone:
        names = ", ".join(part.name for part in gone[:NAMED])
        more = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        omitted.append(f"{len(gone)} of {len(section.parts)} {section.what}: {names}{more}")
    if not kept:
        return Fitted(f"{section.head}Left out; see the end.", tuple(omitted), frozenset())
    body = section.between.join(part.text for part in sorted(kept, key=lambda part: part.place))
    return Fitted(section.head + body, tuple(omitted), frozenset().union(*(part.records for part in kept)))


def _stated(omitted: Sequence[str], budget_tokens: int) -> str:
    if not omitted:
        return "Nothing was left out."
    lines = "".join(f"\n- {line}" for line in omitted)
    return f"To stay within {budget_tokens:,} tokens (counted as characters / 3.5) this was left out:\n{lines}"
