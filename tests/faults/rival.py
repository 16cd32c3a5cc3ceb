"""A process that writes to a run beside others, a step whenever it is told to: python rival.py URL RUN NAME.

A line `read` has it read the run; `answer N TEXT` has it answer the record at position N, as every rival would, by what
it has read and whatever came since; `note TEXT` has it write a record of its own. It prints what came of each as JSON:
position, text and SHA-256 of the record as stored.
"""

import asyncio
import json
import sys
from hashlib import sha256

import structlog
from bus_on import note, on

from sia_events.shared.events import RunResumed
from sia_events.shared.record import answers


async def main(url: str, run: str, name: str) -> None:
    async with on(url) as bus:
        history = await bus.history(run)
        print(json.dumps(len(history)), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            match line.split():
                case ["read"]:
                    history = await bus.history(run)
                    print(json.dumps(len(history)), flush=True)
                    continue
                case ["answer", position, text]:
                    drafts = answers(run, history[int(position) - 1], "service", [note(text)])
                case ["note", text]:
                    drafts = answers(run, history[0], f"{name}-{text}", [note(text)])
                case words:
                    raise ValueError(f"not understood: {words}")
            (record,) = await bus.append(run, drafts)
            assert isinstance(record.event, RunResumed)
            digest = sha256(record.wire).hexdigest()
            print(json.dumps([record.position, record.event.reason, digest]), flush=True)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(*sys.argv[1:]))
