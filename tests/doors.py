"""A `Door` whose gateway says what it is told to say."""

from dataclasses import dataclass

from sia_events.model_gateway.token import TokenDoor


@dataclass(frozen=True)
class ToldDoor(TokenDoor):
    """Real tokens; whoever holds one was kept waiting for so many seconds."""

    held: float | Exception = 0.0

    async def held_up(self, token: str) -> float:
        if isinstance(self.held, Exception):
            raise self.held
        return self.held
