"""Whether a home's log was filled from the streams at hand: runs of two servers may have one name, and must not mix."""

import json
import os
from contextlib import suppress
from hashlib import sha256

from sia_events.infra.clickhouse import ClickHouseLog
from sia_events.shared.ports import Streams
from sia_events.shared.settings import Settings

# In the home: a record that its log has, and so do the streams that the log was filled from.
WITNESS = "witness.json"


class OtherStreams(Exception):
    """The log was filled from other streams than those at hand."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            f"the event log of {settings.home} was filled from other streams: these have no record that it has. "
            "Nothing was written. With another server in SIA_NATS_URL take another SIA_HOME, and another SIA_LOG_DSN "
            "if you set it; where streams were lost, sia verify --all --repair puts back what the log has of them"
        )


async def require_same(settings: Settings, streams: Streams, log: ClickHouseLog) -> None:
    """To be had before the log is filled on. Raises OtherStreams."""
    witness = await log.first_of_some_run()
    if witness is None:
        return
    run, record = witness
    if not await _begins(streams, run, _digest(record)):
        await _require_shared(settings, streams, log)
    kept = {"log": _log_of(settings), "run": run, "record": _digest(record)}
    fresh = settings.home / f"{WITNESS}.{os.getpid()}"
    with suppress(OSError):  # without it the log is asked
        fresh.write_text(json.dumps(kept))
        fresh.replace(settings.home / WITNESS)


async def has_witness(settings: Settings, streams: Streams) -> bool:
    """Whether the streams have what the log was last seen to share with them; no log is opened to tell."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((settings.home / WITNESS).read_text())
        if kept["log"] == _log_of(settings):
            return await _begins(streams, kept["run"], kept["record"])
    return False


async def _require_shared(settings: Settings, streams: Streams, log: ClickHouseLog) -> None:
    """Any record that both have will do: the first of a run may be lost or damaged in either."""
    there = set(await streams.runs())
    for run in await log.runs():
        if run in there:
            ours = {_digest(record) for _, record in await log.rows(run)}
            async for message in streams.messages("SIA", run):
                if _digest(message.body) in ours:
                    return
    raise OtherStreams(settings)


async def _begins(streams: Streams, run: str, digest: str) -> bool:
    async for message in streams.messages("SIA", run):
        return _digest(message.body) == digest
    return False


def _digest(record: bytes) -> str:
    return sha256(record).hexdigest()


def _log_of(settings: Settings) -> str:
    return _digest((settings.log_dsn or "").encode())
