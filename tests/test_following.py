"""How a run is followed to its end."""

from typing import Any, cast

import pytest

from sia_events import app, following


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
