"""Notes outside a process what it tells its clients, so that this is known of whoever is killed; and reads it back.

Whoever calls the bus is its client, and whoever follows a reply is the gateway's. A line is one write: a process that
is killed has written it or not.
"""

import functools
import json
import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from checker import Line, Reply, Told

from sia_events.infra.nats import NatsBus
from sia_events.model_gateway.reading import Reading
from sia_events.shared import failpoints
from sia_events.shared.calls import ModelCall, journal_key
from sia_events.shared.ports import Envelope
from sia_events.shared.record import Draft, Record


def attend(to: Path, passed: Path) -> None:
    """From here on, have this process note what it tells its clients, and the fail points that it comes past."""
    told_to, passed_to = (os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) for file in (to, passed))

    def note(kind: str, said: Any) -> None:
        os.write(told_to, json.dumps([kind, said]).encode() + b"\n")

    append, trace, end, reach = NatsBus.append, NatsBus.trace, Reading.end, failpoints.reach

    @functools.wraps(append)
    async def noted_append(bus: NatsBus, run: str, drafts: Sequence[Draft]) -> Sequence[Record]:
        records = await append(bus, run, drafts)
        for record in records:
            note("record", [run, record.position, sha256(record.wire).hexdigest()])
        return records

    @functools.wraps(trace)
    async def noted_trace(bus: NatsBus, envelope: Envelope) -> None:
        lines = [[line.run, line.kind, line.key, line.body] for line in lines_of(envelope)]
        for line in lines:
            note("sent", line)
        await trace(bus, envelope)
        for line in lines:
            note("line", line)

    @functools.wraps(end)
    def noted_end(reading: Reading, ended: ModelCall | Exception) -> None:
        if isinstance(ended, ModelCall) and ended.reply is not None:
            reply = reply_of(reading.ask.claims.run, ended)
            note("reply", [reply.call, reply.payment])
        end(reading, ended)

    def noted_reach(point: str) -> None:
        os.write(passed_to, point.encode() + b"\n")
        reach(point)

    NatsBus.append, NatsBus.trace, Reading.end = noted_append, noted_trace, noted_end
    for module in [*sys.modules.values()]:
        if vars(module).get("reach") is reach:
            vars(module)["reach"] = noted_reach  # each has taken it over by name


def told(file: Path) -> Told:
    """What was noted of what clients were told."""
    said: dict[str, list[Any]] = {"record": [], "sent": [], "line": [], "reply": []}
    for kind, what in map(json.loads, file.read_text().splitlines()):
        said[kind].append(what)
    return Told(
        tuple((run, position, digest) for run, position, digest in said["record"]),
        tuple(Line(*each) for each in said["line"]),
        tuple(Reply(tuple(call), payment) for call, payment in said["reply"]),
        tuple(Line(*each) for each in said["sent"]),
    )


def lines_of(envelope: Envelope) -> list[Line]:
    return [Line(envelope.run, envelope.kind, envelope.key, sha256(line).hexdigest()) for line in envelope.lines]


def reply_of(run: str, call: ModelCall) -> Reply:
    """The provider tells the place of each payment as its count of prompt tokens."""
    return Reply((run, journal_key(call.attempt), call.digest, call.n), call.prompt_tokens)
