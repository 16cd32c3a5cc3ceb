"""One bit is flipped anywhere in what a home keeps: it is named, or refused, or what is read is what was written.

Never read as something else. Bits that nobody finds are those that nobody reads: of what server and engine derive
anew from the rest (`index.db`, parts that were merged into others, the tokens of inserts long past), of the place a
feed had come to (from an earlier one the same rows are copied once more), and in a definition what changes no answer.
"""

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_verify import filled, looked, on_home

from sia_events import app
from sia_events.home import hold
from sia_events.infra.clickhouse import LogUnavailable
from sia_events.log_here import open_log
from sia_events.rebuilding import rebuild
from sia_events.shared.settings import Settings

RUNS = ("r1", "r2", "b1")
# Each has its own way to be damaged; of the many files in a part one is drawn.
KINDS = (
    "nats/jetstream/$G/streams/SIA/msgs/*.blk",
    "nats/jetstream/$G/streams/SIA_TRACE/msgs/*.blk",
    "nats/jetstream/$G/streams/SIA_PLACES/msgs/*.blk",
    "nats/jetstream/$G/streams/*/msgs/index.db",
    "nats/jetstream/$G/streams/*/meta.*",
    "log/store/*/*/*/*",
    "log/store/*/*/format_version.txt",
    "log/store/*/*/deduplication_logs/*",
    "log/store/*/*/*.sql",
    "blobs/*/*",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    asyncio.run(on_home(home, filled))
    return home


async def read(home: Path) -> dict[str, Any]:
    """All that can be read of the runs, in both places, and the blobs."""
    settings, found = Settings(home=home), {}
    async with hold(settings, "test"), app.stores(settings) as node, open_log(settings) as log:
        for run in RUNS:
            found[f"{run} on the stream"] = [record.wire for record in await node.bus.history(run)]
            found[f"{run} in the tables"] = [record.wire for record in await log.records(run)]
            found[f"{run}'s traces"] = [e.lines for e in await node.bus.traces(run, "log", None)]
            found[f"{run}'s lines"] = sorted({digest for _, _, digest in await log.lines(run)})
        found["blobs"] = {kept.digest: await node.blobs.get(kept.digest) async for kept in node.blobs.listed()}
    return found


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
async def test_no_flipped_bit_is_ever_read_as_something_else(seed: int, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "good", symlinks=True)
    written = await read(tmp_path / "good")
    rng = random.Random(seed)
    for number, kind in enumerate(KINDS):
        home = tmp_path / str(number)
        shutil.copytree(whole, home, symlinks=True)
        where = flip(rng, home, kind)
        try:
            if (await looked(home))["left"]:
                mended = await looked(home, repair=True)
                assert mended["left"] == [], where
        except LogUnavailable as refused:
            assert "sia rebuild" in str(refused), where
            (home / "log").rename(home / "damaged")
            await rebuild(Settings(home=home))
        assert await read(home) == written, where


def flip(rng: random.Random, home: Path, kind: str) -> str:
    """Turn one bit of a file of that kind; returns where."""
    file = rng.choice([each for each in sorted(home.glob(kind)) if each.is_file() and each.stat().st_size])
    body = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(body)), rng.randrange(8)
    body[at] ^= 1 << bit
    file.write_bytes(body)
    return f"bit {bit} of byte {at} in {file.relative_to(home)}"
