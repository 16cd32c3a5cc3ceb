"""A home's scratch folders: what was left behind is removed, and what somebody works in is not."""

from pathlib import Path

from sia_events.home import at_work, hold
from sia_events.shared.settings import Settings


async def test_scratch_folders_go_with_the_next_holder_but_not_from_under_services_at_work(tmp_path: Path):
    settings, live = Settings(home=tmp_path), tmp_path / "tmp/attempt-live"
    live.mkdir(parents=True)
    with at_work(settings), at_work(settings):
        async with hold(settings, "rebuild"):
            assert live.exists()
    async with hold(settings, "run r1"):
        assert not live.exists()
