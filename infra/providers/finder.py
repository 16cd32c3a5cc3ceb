"""Who answers for a model: the adapter of its provider, made when it is first asked for and closed at the end."""

import asyncio
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from sia_events.infra.providers.account import Account, Slots
from sia_events.shared.ports import FailedCall, ModelFailed, Models
from sia_events.shared.providers import BUILT_IN, Kind, Provider, split_model

ADAPTERS: Mapping[Kind, tuple[str, str, str, str]] = {
    "anthropic": ("sia_events.infra.providers.anthropic", "AnthropicModels", "anthropic", "sia-events"),
    "openai": ("sia_events.infra.providers.openai", "OpenAIModels", "openai", "sia-events"),
    "google": ("sia_events.infra.providers.google", "GoogleModels", "google.genai", "sia-events"),
    "vllm": ("sia_events.infra.vllm", "VllmModels", "openai", "sia-events"),
    "litellm": ("sia_events.infra.providers.litellm", "LiteLLMModels", "litellm", "sia-events[litellm]"),
}
"""By kind: our module, its class, the SDK's module, and what to install for it."""


class Hosted(Models, Protocol):
    async def aclose(self) -> None: ...


class Providers:
    """The models of a table of providers. `own` are the engines of kinds that are no outside provider's; `given` is
    what the adapters of a kind are made with beside their account.

    Keys are read from `environ` here, when a provider is first asked, and handed to its adapter and nobody else.
    """

    def __init__(
        self,
        table: Mapping[str, Provider],
        environ: Mapping[str, str],
        own: Mapping[Kind, Models] | None = None,
        given: Mapping[Kind, Mapping[str, Any]] | None = None,
    ) -> None:
        self._table = table
        self._environ = environ
        self._own = own or {}
        self._given = given or {}
        self._open: dict[str, Hosted] = {}
        self._slots: list[Slots] = []

    def find(self, model: str) -> Models:
        """What answers for `provider/name`; the first call for a provider imports its SDK, which takes a second.

        Raises ModelFailed: unknown_model for a provider that is not in the table, no_key where its variable is not set,
        unsupported where its SDK is not installed or it is not served here.
        """
        name, asked = split_model(model)
        if name not in self._table or not asked:
            known = ", ".join(sorted(self._table))
            raise ModelFailed(404, f"no provider for model {model!r}: it is provider/name, of {known}", "unknown_model")
        provider = self._table[name]
        if provider.kind in self._own:
            return self._own[provider.kind]
        if name not in self._open:
            if lack := lacks(provider, self._environ):
                said = f"{name} cannot be asked for {model}: {lack}"
                raise ModelFailed(lack.status, said, lack.kind)
            self._open[name] = self._made(name, provider)
            # An SDK is a hundred thousand objects that stay: left to the collector, every few hundred calls it would go
            # through them all, and every call would wait for it.
            gc.collect()
            gc.freeze()
        return self._open[name]

    def turn_away(self) -> None:
        """Have no call begun any more; those that a provider has go on."""
        for slots in self._slots:
            slots.close()

    async def aclose(self) -> None:
        """Close the connections of every adapter that was made."""
        opened, self._open = list(self._open.values()), {}
        await asyncio.gather(*(adapter.aclose() for adapter in opened))

    def _made(self, name: str, provider: Provider) -> Hosted:
        module, adapter, _, _ = ADAPTERS[provider.kind]
        # A line's end that came with it from a file is no part of a key, and HTTP would quote both in its complaint.
        key = self._environ.get(provider.key_env, "").strip() if provider.key_env else ""
        # Said to the SDK in any case: left to itself it would look for a place in the environment.
        place = provider.base_url or BUILT_IN.get(provider.kind, {}).get("base_url")
        provider = provider.model_copy(update={"base_url": place})
        self._slots.append(slots := Slots(provider.concurrency))
        account, given = Account(name, provider, key, slots), self._given.get(provider.kind, {})
        return getattr(import_module(module), adapter)(account, **given)


@dataclass(frozen=True)
class Lack:
    """Why a provider cannot be asked here: in words, what mends it, and how a call of it fails."""

    what: str
    mend: str
    status: int
    kind: FailedCall

    def __str__(self) -> str:
        return f"{self.what}; {self.mend}"


def lacks(provider: Provider, environ: Mapping[str, str]) -> Lack | None:
    """Why a provider cannot be asked here, None if it can; nothing is imported and nobody is asked."""
    if provider.kind not in ADAPTERS:
        return Lack(f"models of kind {provider.kind} are not served here", "use another model", 400, "unsupported")
    _, _, sdk, package = ADAPTERS[provider.kind]
    if not _installed(sdk):
        return Lack(f"{sdk} is not installed", f"pip install '{package}'", 400, "unsupported")
    if provider.key_env:
        key, mend = environ.get(provider.key_env, "").strip(), f"set {provider.key_env} to a key"
        if not key:
            return Lack(f"the variable {provider.key_env} is not set", mend, 401, "no_key")
        if not (key.isascii() and key.isprintable()):
            # An SDK would quote a header that it cannot send, in what it raises and in what it logs.
            what = f"{provider.key_env} holds no key: there is a line's end or the like in its midst"
            return Lack(what, mend, 401, "no_key")
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
