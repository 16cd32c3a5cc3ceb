"""How a run is followed to its end."""

from pathlib import Path
from typing import Any, cast

import pytest
from bus_on import opened

from sia_events import app, following
from sia_events.home import hold
from sia_events.shared.settings import Settings


class Behind:
    """A bus whose recorder, elsewhere, is away."""

    async def lag(self, name: str) -> int:
        return 1


async def test_who_only_follows_waits_for_the_log_once_and_says_once_that_it_is_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async def over(*_: Any) -> str:
        return "the end"

    monkeypatch.setattr(following, "CATCH_UP_S", 0.0)
    monkeypatch.setattr(following, "_until_over", over)
    nothing = cast(Any, None)
    node = app.Node(settings=nothing, bus=cast(Any, Behind()), blobs=nothing, private=nothing, streams=nothing)
    assert cast(Any, await following._followed(node, "r1", True)) == "the end"
    assert capsys.readouterr().err.count("the log is behind the stream") == 1


async def test_how_a_run_ended_is_told_also_where_the_log_has_not_come_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = Settings(home=tmp_path)
    async with hold(settings, "test"), app.stores(settings) as node:
        history = await opened(node.bus, "r1")
        told = await following._summary(settings, history)
    assert told["run"] == "r1" and told["records"] == len(history) and "model_calls" in told["cost"]
    assert "told by the records alone, as the log does not say: no run 'r1'" in capsys.readouterr().err
