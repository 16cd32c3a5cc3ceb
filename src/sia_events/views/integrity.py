"""What was verified, kept, swept and counted, for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from sia_events.views.records import clean
from sia_events.views.tables import table


def verify_text(found: Mapping[str, Any]) -> str:
    """`sia verify`: each finding in a line, then what it comes to."""
    mended = [_key(each) for each in found["mended"]]
    left = {_key(each): each for each in found["left"]}
    lines: list[str] = []
    for each in found["findings"]:
        told = left.pop(_key(each), each)
        state = "harmless" if each["harmless"] else "mended" if _key(each) in mended else "LEFT"
        why = each["harmless"] or told["detail"]
        lines.append(f"{state:<9} {_place(each)}{': ' if why else ''}{why}")
    lines += [f"{'LEFT':<9} {_place(each)}: {each['detail']}" for each in left.values()]
    looked = f"{found['runs']} runs, {found['records']} records, {found['lines']} trace lines, {found['blobs']} blobs"
    if found["left"]:
        return "\n".join([*lines, f"{looked}: {len(found['left'])} places are not as they were written"])
    return "\n".join([*lines, f"{looked}: whole"])


def archive_text(made: Mapping[str, Any]) -> str:
    runs = " and ".join(made["runs"])
    text = f"{made['file']}: {runs}, {made['records']} records, {made['blobs']} blobs, {made['bytes']:,} bytes"
    missing = [f"blob {digest} is named and was not there" for digest in made["missing"]]
    return "\n".join([text, *missing, *(f"left out: {each}" for each in made["left_out"])])


def restore_text(put: Mapping[str, Any]) -> str:
    runs = " and ".join(put["runs"])
    return f"{runs}: {put['records']} records were missing here and are back; {put['blobs']} blobs"


def sweep_text(found: Mapping[str, Any]) -> str:
    count, size = len(found["blobs"]), found["bytes"] / 1e6
    said = (
        f"{count} blobs of {size:.1f} MB are named nowhere, {found['kept']} are or are written since {found['since']}"
    )
    if found["removed"]:
        return f"{said}; {found['removed']} removed"
    return f"{said}; sia gc --yes removes them" if count else said


def letters_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no dead letters"
    cells = [(r["run"], r["position"], r["service"], r["tries"], r["state"], clean(r["error"])[:90]) for r in rows]
    return table(("run", "position", "service", "tries", "state", "error"), cells)


def letter_text(letter: Mapping[str, Any]) -> str:
    about = f"record {letter['failed']}" if letter["failed"] else "a message that is no record"
    lines = [
        f"letter {letter['position']} of run {letter['run']}, {letter['state']}",
        f"{letter['service']} gave up on {about} (sequence {letter['sequence']}) after {letter['tries']} tries:",
        letter["error"],
        "",
        letter["text"] if letter["text"] is not None else f"its payload {letter['payload']} is lost",
    ]
    return clean("\n".join(lines))


def retry_text(said: Mapping[str, Any]) -> str:
    if said["up"]:
        return f"{said['service']} is given run {said['run']} again"
    return f"no services are up: sia up, or sia run --resume {said['run']}, gives {said['service']} its record again"


def status_text(found: Mapping[str, Any]) -> str:
    who = found["process"]
    up = f"process {who['pid']} (sia {who['purpose']})" if who else "nobody runs services here"
    parts = f"; {' and '.join(found['up'])} up" if found["up"] else ""
    streams = [
        (
            each["stream"],
            each["messages"],
            f"{each['bytes'] / 1e6:.1f} MB",
            f"{100 * each['bytes'] / each['limit']:.1f} % of {each['limit'] / 1e6:.0f} MB"
            if each["limit"]
            else "no limit",
            each["lag"],
        )
        for each in found["streams"]
    ]
    tables = [(each["table"], each["rows"], f"{each['bytes'] / 1e6:.1f} MB", each["parts"]) for each in found["tables"]]
    at_work = [(name, *counts.values()) for name, counts in found["services"].items() if any(counts.values())]
    runs = "not counted in time"
    if found["runs"] is not None:
        runs = ", ".join(f"{count} {status}" for status, count in found["runs"].items()) or "none"
    letters = "not counted in time" if found["letters"] is None else found["letters"]
    lines = [
        f"{found['home']}: {up}{parts}; {found['free'] / 1e9:.1f} GB free",
        f"the tables are {found['lag']} messages behind; runs: {runs}; open dead letters: {letters}",
        "",
        table(("stream", "messages", "size", "of its limit", "not copied"), streams),
        "",
        f"the stream keeps everything, and the recorder goes on from there: {found['log']}"
        if found["log"]
        else table(("table", "rows", "size", "parts"), tables),
    ]
    if at_work:
        lines += ["", table(("service", "records waiting", "being answered", "runs asked for"), at_work)]
    if found["unbounded"]:
        lines += [
            "",
            f"ClickHouse's own tables without an end: {', '.join(found['unbounded'])} (docs/troubleshooting.md)",
        ]
    return "\n".join(lines)


def _key(finding: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(finding[name] for name in ("kind", "store", "run", "place"))


def _place(finding: Mapping[str, Any]) -> str:
    of = f" of run {finding['run']}" if finding["run"] else ""
    return f"{finding['kind']} in the {finding['store']}: {finding['place']}{of}"
