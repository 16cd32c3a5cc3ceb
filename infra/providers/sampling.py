"""Which sampling arguments each model refuses, learned from its refusals.

Some models take no temperature, others no seed, and no provider has a list. A refused request costs nothing, so it is
sent once more without the argument that was named, and the model is not asked with it again.
"""

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from sia_events.shared.ports import ModelFailed

HINTS = ("temperature", "top_p", "seed")
# A refusal of what stands in one request is not one of the argument: learned, it would change everybody's calls.
OF_A_VALUE = re.compile(r"range|maximum|minimum|less than|greater than|between|[<>]=|must be", re.IGNORECASE)
T = TypeVar("T")


class Sampling:
    """The refusals of one provider's models, for as long as the process lives."""

    def __init__(self) -> None:
        self._refused: defaultdict[str, set[str]] = defaultdict(set)

    async def fitted(self, body: Mapping[str, Any], send: Callable[[Mapping[str, Any]], Awaitable[T]]) -> T:
        """`send` what the model takes of `body`. Raises ModelFailed for every refusal that is about something else."""
        refused = self._refused[body["model"]]
        while True:
            sent = {name: value for name, value in body.items() if name not in refused}
            try:
                return await send(sent)
            except ModelFailed as failed:
                named = {hint for hint in HINTS if hint in sent and re.search(rf"\b{hint}\b", str(failed))}
                if failed.kind != "refused" or not named or OF_A_VALUE.search(str(failed)):
                    raise
                refused |= named
