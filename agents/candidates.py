"""Candidates side by side: each written by an LLM agent, held against the harness contract, stored, told apart."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase

from sia_events.agents.check import changed, problems, without_caches
from sia_events.agents.client import spending
from sia_events.shared.events import BackendName, Written
from sia_events.shared.outage import fails_alone
from sia_events.shared.ports import Backend, Brief, ModelAway, Ports, ProviderAway, Writing, WritingFailed
from sia_events.shared.service import Work
from sia_events.shared.tree import store_tree

REASON = 400
APART = """\

You write candidate {place} of {count}. The others are written at the same time, from the same words, and you do not
see them: prefer an idea that somebody else might not have first."""


@dataclass(frozen=True)
class Candidate:
    """A harness that can be tried. `version` is its name, `place` counts from 0, `edits` are the paths it changed."""

    version: str
    place: int
    harness: str
    edits: tuple[str, ...]
    reason: str
    written: Written


@dataclass(frozen=True)
class Candidates:
    """What came of writing several; `left_out` says in words what cannot be used, and why."""

    usable: tuple[Candidate, ...]
    left_out: tuple[str, ...]


class NoBackend(Exception):
    """The run names a way to write harnesses that this installation does not have."""


async def write_candidates(
    wanted: Sequence[tuple[Brief, int]],
    generation: int,
    backend: BackendName,
    known: Mapping[str, str],
    work: Work,
) -> Candidates:
    """The candidates of a generation by `backend`, so many from each brief as stands beside it, all at the same time.

    Each has its own journal under "ROLE.VERSION" and its own seed. `known` names harnesses, by digest, that would be
    no news. What is not the agents' own doing is raised, once all of them have ended: replies that came are recorded.
    """
    ports = work.ports
    author = ports.backends.get(backend)
    if author is None:
        there = ", ".join(sorted(ports.backends)) or "none"
        raise NoBackend(f"backend {backend!r} is not installed here; there are: {there}. Nothing was asked or paid for")
    each_from = [(brief, place, count) for brief, count in wanted for place in range(count)]
    versions = [f"g{generation}{ascii_lowercase[place]}" for place in range(len(each_from))]
    briefs = [_brief(*one, version, seed) for seed, (version, one) in enumerate(zip(versions, each_from, strict=True))]
    ended = await asyncio.gather(*(_write(author, each, ports) for each in briefs), return_exceptions=True)
    usable: list[Candidate] = []
    left_out: list[str] = []
    seen = dict(known)
    for place, (version, each, result) in enumerate(zip(versions, briefs, ended, strict=True)):
        if isinstance(result, BaseException):
            left_out.append(f"{version}: {await why_none(result, each, work)}")
            continue
        harness = await store_tree(ports.blobs, result.files)
        if harness in seen:
            left_out.append(f"{version}: the same files as {seen[harness]}")
            continue
        seen[harness] = version
        note = _text(result.note)
        written = Written(
            backend=backend,
            model=each.model,
            prompt=await ports.blobs.put(_text(each.prompt).encode()),
            trajectory=await ports.blobs.put(result.trajectory),
            note=await ports.blobs.put(note.encode()),
            **await spending(each, ports),
        )
        edits = changed(each.files, result.files)
        usable.append(Candidate(version, place, harness, edits, _short(note), written))
    return Candidates(tuple(usable), tuple(left_out))


async def why_none(ended: BaseException, brief: Brief, work: Work) -> str:
    """Why nothing was written, and the digest under which the conversation is kept.

    Raises `ended` where it is neither the agent's doing nor that of a request which its provider fails for good.
    """
    if isinstance(ended, WritingFailed):
        kept = f" (kept as {await work.ports.blobs.put(ended.trajectory)})" if ended.trajectory else ""
        return f"{ended}{kept}"
    away = isinstance(ended, ProviderAway | ModelAway)
    if away and await fails_alone(work, ended, brief.claims("", work.ports.clock.now())):
        return f"given up, since its provider answers others: {ended}"
    raise ended


def _brief(brief: Brief, place: int, count: int, version: str, seed: int) -> Brief:
    apart = APART.format(place=place + 1, count=count) if count > 1 else ""
    return replace(brief, key=f"{brief.role}.{version}", seed=brief.seed + seed, prompt=brief.prompt + apart)


async def _write(author: Backend, brief: Brief, ports: Ports) -> Writing:
    """What the backend wrote, held against the contract once more, whoever the backend is."""
    writing = await author.write(brief, ports)
    writing = replace(writing, files=without_caches(writing.files))
    found: Sequence[str] = problems(writing.files)
    if not found and not changed(brief.files, writing.files):
        found = ["it changes nothing"]
    if found:
        raise WritingFailed("; ".join(found), writing.trajectory)
    return writing


def _text(said: str) -> str:
    """A model's words without half characters, which no file takes."""
    return said.encode(errors="replace").decode()


def _short(note: str) -> str:
    line = " ".join(note.split())
    return line if len(line) <= REASON else f"{line[:REASON]} …"
