"""One provider as it is asked: its row of the table, its key, and how many calls it may have at once."""

import asyncio
from dataclasses import dataclass, field

from sia_events.shared.ports import Chat, ModelFailed
from sia_events.shared.providers import Provider, split_model


class Slots:
    """How many calls a provider may have at once. Behind `close` none is begun, and those under way go on."""

    def __init__(self, concurrency: int) -> None:
        self._free = asyncio.Semaphore(concurrency)
        self._closed = False

    def close(self) -> None:
        self._closed = True

    async def __aenter__(self) -> None:
        await self._free.acquire()
        if self._closed:
            self._free.release()
            raise ModelFailed(503, "the gateway is ending: nothing was asked")

    async def __aexit__(self, *_: object) -> None:
        self._free.release()


@dataclass(frozen=True)
class Account:
    """`key` is "" where none is needed. It is in no repr, and `failures` takes it out of every message."""

    name: str
    provider: Provider
    key: str = field(repr=False)
    slots: Slots = field(repr=False)


def asked_model(account: Account, call: Chat) -> str:
    """The provider's own name for the model of a call. Raises ModelFailed for an adapter: only our server has those."""
    if call.adapter is not None:
        raise unsupported(account, "takes no adapters: weights are learned for models of kind local and vllm only")
    return split_model(call.model)[1]


def unsupported(account: Account, what: str) -> ModelFailed:
    return ModelFailed(400, f"{account.name} {what}; nothing was asked", kind="unsupported")
