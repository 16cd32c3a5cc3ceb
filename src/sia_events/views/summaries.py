"""Runs as people see them: how one ended, one whole, two versions of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sia_events.shared.events import SEEDS_APART
from sia_events.shared.run import Run
from sia_events.shared.summary import shown
from sia_events.views.records import clean
from sia_events.views.tables import table

NOT_HELD_OUT = "  SCORE IS NOT HELD OUT: dev, gate and test are the same set (docs/coming-from-sia.md)"


def ending_text(summary: Mapping[str, Any], home: Path) -> str:
    """How a run ended: sealed scores, what each lever gave, where it is, what to do next."""
    run, sealed = summary["run"], summary["sealed"]
    lines = ["", f"run {run}: {summary['outcome'] or summary['status']}"]
    if not summary["held_out"]:
        lines.append(NOT_HELD_OUT)
    if sealed:
        lines += [
            f"  sealed test, {sealed['final']['n']} items, scored once:",
            f"    first   {shown(sealed['first'])}   {summary['generations'][0]['version']}",
            f"    final   {shown(sealed['final'])}   {summary['best']}",
            f"    gain    {_gain(sealed)}   p = {sealed['p_value']:.2g}",
        ]
        if summary["chance"] is not None:
            lines.append(f"    chance  {summary['chance']:.3f}   one answer for every item")
    if summary["outcome"] == "no proven gain":
        lines.append(
            "  No gain could be shown. The final agent is no worse than the first by the gate, and no better by proof."
        )
    if summary["outcome"] == "failed":
        lines.append(f"  {summary['reason']}")
    for lever, gave in summary["levers"].items():
        if gave["tried"]:
            lines.append(
                f"  {lever:<8} {gave['accepted']} of {gave['tried']} versions accepted, {gave['gain']:+.3f} on the gate"
            )
    lines += [f"  {_spent(summary['cost'])}, {summary['records']} records", f"  kept in {home}"]
    lines += ["", "next:", *(f"  {command:<43} {why}" for command, why in _next(summary))]
    return "\n".join(lines)


def stopped_text(run: Run) -> str:
    """Why a run that is not over does nothing, and what makes it go on."""
    then = f", then sia run --resume {run.name}"
    if run.cancelled is not None:
        return f"sia: run {run.name} was cancelled: {run.cancelled}. What it recorded stays; sia branch goes on from it"
    if run.exhausted:
        used = f"its budget of {run.exhausted.allowed:g} {run.exhausted.limit} is used up"
        return f"sia: run {run.name} is paused: {used}: sia budget {run.name} --{run.exhausted.limit} MORE{then}"
    if run.paused is not None:
        return f"sia: run {run.name} is paused: {run.paused}: sia resume {run.name}{then}"
    assert run.waiting, "only a run that is held or waits for a person stops before its end"
    answer = f"sia approve {run.name}, or sia refuse {run.name} --reason TEXT"
    return f"sia: run {run.name} waits for approval of {run.waiting.subject} ({run.waiting.reason}): {answer}{then}"


def _spent(cost: Mapping[str, Any]) -> str:
    calls, tokens = f"{cost['model_calls']:,} model calls", f"{cost['tokens']:,} tokens"
    dollars = "price unknown" if cost["usd"] is None else f"{cost['usd']:.2f} USD"
    return f"{calls}, {tokens}, {dollars}, {cost['seconds']:.0f} s"


def _next(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Commands worth trying behind such an end, and what each does."""
    run = summary["run"]
    if not summary["sealed"]:
        return [
            (f"sia show {run}", "how far it came"),
            (f"sia log {run}", "what happened, record by record"),
            (f"sia run --resume {run}", "go on, if it is not over"),
            ("sia doctor", "what works here, and how to mend what does not"),
        ]
    other = "harness" if summary["lever"] == "weights" else "weights"
    change = f"lever={other}" if summary["settings"]["target_model"].startswith("local/") else f"seed={SEEDS_APART}"
    why = "under the other lever" if change.startswith("lever") else "with other chances"
    first = summary["generations"][0]["version"]
    last = min(1, summary["generations"][-1]["generation"])
    return [
        (f"sia show {run}", "every version, its scores and its verdict"),
        (f"sia replay {run}", "decide it all again from the log, calling nothing"),
        (f"sia branch {run} --at {last} --set {change}", f"go on from generation {last} {why}"),
        (f"sia diff {run} {first} {summary['best']}", "what changed between first and best"),
    ]


def summary_text(summary: Mapping[str, Any]) -> str:
    """`sia show` for people."""
    head = f"run {summary['run']}   task {summary['task']}   {summary['status']}   {summary['records']} records"
    if summary["parent"]:
        head += f"   branch of {summary['parent']}"
    if summary["chance"] is not None:
        head += f"   chance {summary['chance']:.3f}"
    cells = [
        (
            v["generation"],
            v["version"],
            v["parent"],
            v["lever"],
            _score(v, "dev"),
            _score(v, "gate"),
            _score(v, "test"),
            _verdict(v),
        )
        for v in summary["generations"]
    ]
    lines = [head, "", table(("gen", "version", "from", "lever", "dev", "gate", "sealed test", "verdict"), cells)]
    if summary["outcome"]:
        lines += ["", f"{summary['outcome']}: {summary['reason']}"]
    if not summary["held_out"]:
        lines.append(NOT_HELD_OUT)
    for failure in summary["service_failures"]:
        lines += [f"{failure['service']} gave up: {failure['error']} (payload {failure['payload'][:12]})"]
    return clean("\n".join([*lines, "", _spent(summary["cost"])]))


def diff_text(changes: Mapping[str, Any]) -> str:
    lines = [f"run {changes['run']}: {changes['before']} -> {changes['after']}"]
    lines += [f"  {name:<6}{_made(version)}" for name, version in changes["versions"].items()]
    for name, scores in changes["scores"].items():
        lines.append(f"  {name:<6}" + "  ".join(f"{split} {shown(score)}" for split, score in scores.items()))
    if gains := changes["gains"]:
        lines.append("  gain  " + "  ".join(f"{split} {_gain(gain)}" for split, gain in gains.items()))
    old, new = changes["adapters"]
    lines.append(
        f"  adapter {(old or 'none')[:12]} -> {(new or 'none')[:12]}"
        if old != new
        else f"  same adapter: {(old or 'none')[:12]}"
    )
    for text in changes["files"].values():
        lines += ["", text]
    if not changes["files"]:
        lines.append("  same harness")
    return clean("\n".join(lines))


def _made(version: Mapping[str, Any]) -> str:
    if not version["parent"]:
        return "first agent"
    return f"{version['lever']} of {version['parent']}" + (
        f": {' + '.join(version['edits'])}" if version["edits"] else ""
    )


def _gain(compared: Mapping[str, Any]) -> str:
    return f"{compared['gain']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]"


def _score(version: Mapping[str, Any], split: str) -> str:
    return shown(version["scores"][split]) if split in version["scores"] else ""


def _verdict(version: Mapping[str, Any]) -> str:
    if version["accepted"] is None:
        return "open"
    return ("accepted: " if version["accepted"] else "rejected: ") + version["verdict"]
