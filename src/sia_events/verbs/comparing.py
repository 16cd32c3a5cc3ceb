"""The verbs that set runs side by side: the tree of branches, and a comparison in a table or on a page."""

from pathlib import Path
from typing import Annotated

import typer

from sia_events.terminal import Json, settings, tell, wait_for, write


def tree(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Only the tree that this run is in; all of them if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs and their branches: where each parts from its parent, what is different, what it came to."""
    from sia_events import lineages
    from sia_events.views import trees

    tell(wait_for(lineages.tree(settings(), run)), as_json, trees.tree_text)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...")],
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as one HTML page that needs nothing else.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs side by side, aligned at their fork: scores, cost, harnesses, adapters, flips and a paired test."""
    from sia_events import comparing
    from sia_events.views import comparison_page, comparisons

    found = wait_for(comparing.compared(settings(), runs))
    if page is None:
        tell(found, as_json, comparisons.comparison_text)
        return
    tell({"page": write(page, comparison_page.comparison_page(found).encode())}, as_json, lambda told: told["page"])
