"""What a nats-server of ours says of its health, and what is done about a stream that it could not read."""

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path

import structlog

HEALTH_S = 2.0
SILENT = "no answer"

# How a stream was set up, and that file's checksum.
_SETUP = ("meta.inf", "meta.sum")
_UNREAD = re.compile(r"stream '\$G > (\w+)' could not be recovered")

log = structlog.get_logger()


async def ailment(port: int, patience: float = HEALTH_S) -> str | None:
    """What its monitoring port says is wrong with the server; None where it is well."""
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return SILENT
    if b" 200 " in head.partition(b"\r\n")[0]:
        return None
    with suppress(ValueError, KeyError):
        return json.loads(body)["error"]
    return body.decode(errors="replace") or SILENT


def set_aside_setup(store: Path, ailment: str) -> bool:
    """Whether the server lacks a stream because of how it was set up: then that is set aside, for us to state anew.

    To be asked once the server has read its store: until then it says the same of streams that it has not come to. A
    stream that is made where messages lie takes them over; one bit of its set-up must not keep them from everybody.
    """
    if not (found := _UNREAD.search(ailment)):
        return False
    folder = store / "jetstream" / "$G" / "streams" / found[1]
    for name in _SETUP:
        with suppress(FileNotFoundError):
            (folder / name).replace(folder / f"{name}.damaged")
    log.warning("a stream's set-up is damaged: it is set up anew, around its messages", folder=str(folder))
    return True
