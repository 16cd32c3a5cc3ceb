"""One provider as it is asked: its row of the table, its key, and how many calls it may have at once."""

import asyncio
from dataclasses import dataclass, field

from sia_events.shared.ports import Chat, ModelFailed
from sia_events.shared.providers import Provider, split_model


@dataclass(frozen=True)
class Account:
    """`key` is "" where none is needed. It is in no repr, and `failures` takes it out of every message."""

    name: str
    provider: Provider
    key: str = field(repr=False)
    slots: asyncio.Semaphore = field(repr=False)


def asked_model(account: Account, call: Chat) -> str:
    """The provider's own name for the model of a call. Raises ModelFailed for an adapter: only our server has those."""
    if call.adapter is not None:
        raise unsupported(account, "takes no adapters: weights are learned for local/ models only")
    return split_model(call.model)[1]


def unsupported(account: Account, what: str) -> ModelFailed:
    return ModelFailed(400, f"{account.name} {what}; nothing was asked", kind="unsupported")
