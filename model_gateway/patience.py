"""How a provider that fails is asked again: what may pass, how long it is waited for, and whose fault it was."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from sia_events.shared.ports import ModelFailed

# What no change of the request would mend: the run was set up with it.
NOT_THE_CALLERS = ("no_key", "unknown_model", "rate_limited", "timeout")
# The embedded model takes a few seconds to start.
QUIET_S, COMPLAINTS_S = 5.0, 20.0

T = TypeVar("T")

log = structlog.get_logger()
_backoff = wait_exponential(multiplier=0.2, max=5) + wait_random(0, 0.5)


class Patience:
    """For how many seconds a provider that is away is asked again, ever more slowly, or when it says to come back."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._complained: dict[str, float] = {}

    async def asked(
        self, model: str, ask: Callable[[], Awaitable[T]], goes_on: Callable[[], bool], rests: Callable[[], None]
    ) -> T:
        """What `ask` returns, tried while the fault is the provider's and it `goes_on`; `rests` is told of each wait.

        A provider that wants to be asked later than there is patience for is not asked again. Raises what the last
        try raised.
        """

        def rest(state: RetryCallState) -> None:
            rests()
            self._tell(model, state)

        tries = AsyncRetrying(
            retry=retry_if_exception(lambda error: goes_on() and _passes(error)),
            stop=stop_before_delay(self._seconds),
            wait=_pause,
            before_sleep=rest,
            reraise=True,
        )
        return await tries(ask)

    def _tell(self, model: str, state: RetryCallState) -> None:
        """Say that a provider keeps us waiting, seldom and for all its calls: who follows would take it for a hang."""
        now = time.monotonic()
        long, lately = (state.seconds_since_start or 0.0) > QUIET_S, self._complained.get(model, float("-inf"))
        if state.outcome and long and now > lately + COMPLAINTS_S:
            self._complained[model] = now
            why = str(state.outcome.exception())
            log.warning("a model does not answer, and is asked again", model=model, why=why)


def is_the_callers(failed: ModelFailed) -> bool:
    """Whether the request was at fault, and not the provider or how the run was set up."""
    return 400 <= failed.status < 500 and failed.status not in (408, 429) and failed.kind not in NOT_THE_CALLERS


def _passes(error: BaseException) -> bool:
    """Whether the same request may well be answered later."""
    return (
        isinstance(error, ModelFailed)
        and (error.status >= 500 or error.status in (408, 429))
        and error.kind not in ("garbage", "unsupported")
    )


def _pause(state: RetryCallState) -> float:
    failed = state.outcome.exception() if state.outcome else None
    asked_for = failed.retry_after if isinstance(failed, ModelFailed) else None
    return max(_backoff(state), asked_for or 0.0)
