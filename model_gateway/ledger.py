"""What the gateway asks of a run's budget."""

from collections.abc import Mapping
from typing import Any, Protocol

from sia_events.model_gateway.budget import Reservation, Spend


class Ledger(Protocol):
    """What a run may spend; `model_gateway/budget.py` has the real one."""

    async def look(self, run: str) -> None:
        """Have the run's limits and what it spent before, as its history has them."""
        ...

    async def reserve(self, run: str, model: str, prompt_tokens: int, max_tokens: int) -> Reservation:
        """Set aside the worst that one call can take. Raises OverBudget."""
        ...

    async def settle(self, reservation: Reservation, usage: Mapping[str, Any] | None) -> float | None:
        """Give that back and count what was used, None for nothing; returns US dollars, None for an unknown price."""
        ...


class Unlimited:
    """The `Ledger` of a gateway that has neither limits nor prices."""

    async def look(self, run: str) -> None:
        pass

    async def reserve(self, run: str, model: str, prompt_tokens: int, max_tokens: int) -> Reservation:
        return Reservation(run, model, Spend())

    async def settle(self, reservation: Reservation, usage: Mapping[str, Any] | None) -> float | None:
        return None
