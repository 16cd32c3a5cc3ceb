"""A reply on its way from the provider to whoever follows it."""

import asyncio
from collections.abc import AsyncIterator, Callable

from sia_events.model_gateway.wire import Ask, Body
from sia_events.shared.calls import ModelCall


class Reading:
    """A reply on its way. Whoever follows it gets every part from the first one on, and then the recorded call.

    It goes on when nobody follows it any more: the provider is paid for what it says. `asked` is whether the provider
    has the call, or has answered it: then it may be paid for.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.native = False
        self.asked = False
        self.parts: list[Body] = []
        self._end: ModelCall | Exception | None = None
        self._if_unanswered: list[Callable[[], None]] = []
        self._news = asyncio.Event()

    def add(self, part: Body) -> None:
        self.parts.append(part)
        self._wake()

    def end(self, end: ModelCall | Exception) -> None:
        """With the recorded call, or with why there is none."""
        assert self._end is None, "a reply ends once"
        self._end = end
        if self._unanswered:
            for then in self._if_unanswered:
                then()
        self._wake()

    def if_unanswered(self, then: Callable[[], None]) -> None:
        """Have `then` called where it ends, or has ended, without a reply."""
        if self._unanswered:
            then()
        self._if_unanswered.append(then)

    async def begun(self) -> None:
        """Returns when there is a first part, or the end."""
        while not self.parts and self._end is None:
            await self._news.wait()

    async def follow(self) -> AsyncIterator[Body]:
        seen = 0
        while seen < len(self.parts) or self._end is None:
            if seen == len(self.parts):
                await self._news.wait()
            else:
                yield self.parts[seen]
                seen += 1

    async def call(self) -> ModelCall:
        """The call as it is recorded. Raises Refused for a request that cannot be served."""
        while self._end is None:
            await self._news.wait()
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    @property
    def _unanswered(self) -> bool:
        return isinstance(self._end, Exception) or (self._end is not None and self._end.reply is None)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
