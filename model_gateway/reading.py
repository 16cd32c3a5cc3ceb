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
        self._ended: asyncio.Future[ModelCall] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()

    def add(self, part: Body) -> None:
        self.parts.append(part)
        self._wake()

    def end(self, call: ModelCall | None, error: Exception | None = None) -> None:
        """With the recorded call, or with why there is none."""
        if call is not None:
            self._ended.set_result(call)
        else:
            assert error is not None, "a call that is not recorded has a reason"
            self._ended.set_exception(error)
            self._ended.exception()  # looked at: there may be nobody left to raise it to
        self._wake()

    def if_unanswered(self, then: Callable[[], None]) -> None:
        """Have `then` called where it ends without a reply."""

        def look(ended: asyncio.Future[ModelCall]) -> None:
            if ended.exception() or ended.result().reply is None:
                then()

        self._ended.add_done_callback(look)

    async def begun(self) -> None:
        """Returns when there is a first part, or the end."""
        while not self.parts and not self._ended.done():
            await self._news.wait()

    async def follow(self) -> AsyncIterator[Body]:
        seen = 0
        while seen < len(self.parts) or not self._ended.done():
            if seen == len(self.parts):
                await self._news.wait()
            else:
                yield self.parts[seen]
                seen += 1

    async def call(self) -> ModelCall:
        """The call as it is recorded. Raises Refused for a request that cannot be served."""
        return await asyncio.shield(self._ended)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
