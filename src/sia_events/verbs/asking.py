"""The verb that asks the log in SQL."""

from pathlib import Path
from typing import Annotated

import typer

from sia_events.terminal import Json, Wrong, settings, tell, wait_for, write


def sql(
    query: Annotated[
        str | None, typer.Argument(metavar="[SELECT]", help="One SELECT; what there is to ask if left out.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what it finds as a Parquet file.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the log in ClickHouse's SQL, reading only: runs, versions, scores, model_calls, costs … (docs/sql.md)."""
    from sia_events import asking
    from sia_events.views import answers

    if query is not None and not query.strip(" ;\n"):
        raise Wrong("nothing is asked: give one SELECT, or leave it out and be told what there is to ask")
    if query is None:
        if parquet:
            raise Wrong("--parquet FILE needs a SELECT whose rows go into it")
        tell(wait_for(asking.views(settings())), as_json, answers.views_text)
        return
    if parquet is None:
        tell(wait_for(asking.rows(settings(), query)), as_json, answers.rows_text)
        return
    tell(
        {"parquet": write(parquet, wait_for(asking.parquet(settings(), query)))}, as_json, lambda told: told["parquet"]
    )
