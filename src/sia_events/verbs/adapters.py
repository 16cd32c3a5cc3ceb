"""The verb that lists what a run has learned."""

from typing import Any

from sia_events.terminal import Json, RunName, settings, tell, wait_for


def adapters(run: RunName, as_json: Json = False) -> None:
    """The run's adapters: algorithm, parent, probe, and whether the gate let them through."""
    from sia_events import adapters, reading
    from sia_events.views.adapters import adapters_text

    async def told() -> list[dict[str, Any]]:
        return adapters.adapters(await reading.records(settings(), run))

    tell(wait_for(told()), as_json, adapters_text)
