"""The table of model providers: how each is reached, what its models cost, and which models play which role."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Kind = Literal["anthropic", "openai", "google", "litellm", "vllm", "local", "instant"]
ProviderName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Row(BaseModel):
    """Part of a table: immutable, no unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provider(Row):
    """One row `[providers.NAME]`: models named NAME/… are asked here.

    `kind` says which API it speaks: `openai` is any OpenAI-compatible endpoint. Without a `base_url` it is asked where
    the vendor of its kind is. `key_env` is the variable that has the
    key, None where none is needed. `responses` says whether it also takes OpenAI's responses API; left out, only
    OpenAI's own endpoint does. `adapters` is for kind `vllm`: the folder, of this row alone, from which its server
    reads the LoRA adapters that are laid down there, by the same path.
    """

    kind: Kind
    base_url: str | None = Field(default=None, pattern=r"^https?://")
    key_env: str | None = Field(default=None, min_length=1)
    concurrency: int = Field(default=8, ge=1, le=1000)
    timeout_s: float = Field(default=600.0, gt=0)
    responses: bool | None = None
    adapters: str | None = Field(default=None, pattern=r"^/")


class Roles(Row):
    """`[roles]`: the models of the roles that a run names no model for, each provider/model."""

    meta: str | None = Field(default=None, pattern=r"^[^/]+/.+")
    feedback: str | None = Field(default=None, pattern=r"^[^/]+/.+")
    target: str | None = Field(default=None, pattern=r"^[^/]+/.+")


class Price(Row):
    """One row `[prices."provider/model"]`, in USD per million tokens.

    `cached_input` and `cache_write` are what prompt tokens cost that are read from or written to the provider's cache;
    left out, they cost what other input does.
    """

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    cache_write: float | None = Field(default=None, ge=0)


BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "anthropic": {"kind": "anthropic", "base_url": "https://api.anthropic.com", "key_env": "ANTHROPIC_API_KEY"},
    "openai": {"kind": "openai", "base_url": "https://api.openai.com/v1", "key_env": "OPENAI_API_KEY"},
    "google": {"kind": "google", "base_url": "https://generativelanguage.googleapis.com", "key_env": "GEMINI_API_KEY"},
    "openrouter": {"kind": "openai", "base_url": "https://openrouter.ai/api/v1", "key_env": "OPENROUTER_API_KEY"},
    "together": {"kind": "openai", "base_url": "https://api.together.xyz/v1", "key_env": "TOGETHER_API_KEY"},
    "nebius": {"kind": "openai", "base_url": "https://api.studio.nebius.com/v1", "key_env": "NEBIUS_API_KEY"},
    "ollama": {"kind": "openai", "base_url": "http://127.0.0.1:11434/v1"},
    "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:8000/v1"},
    "local": {"kind": "local"},
    "instant": {"kind": "instant"},
}
"""The rows there are without any file; a file's or a variable's fields go over them one by one."""

FREE: tuple[Kind, ...] = ("local", "instant")
"""Kinds whose calls nobody bills."""

TRAINED = ("local", "vllm")
"""Providers, by name, that load the adapters of a run: the weights of their models are ours to change."""


def trainable(model: str) -> bool:
    """Whether the weights lever can be pulled on a model, by its name."""
    return split_model(model)[0] in TRAINED


def built_in() -> Mapping[str, Provider]:
    return {name: Provider.model_validate(row) for name, row in BUILT_IN.items()}


def split_model(model: str) -> tuple[str, str]:
    """A model's provider, and the provider's own name for it: what stands before and behind the first "/"."""
    provider, _, name = model.partition("/")
    return provider, name


def cost(price: Price, usage: Mapping[str, Any]) -> float:
    """What a call costs in USD.

    `usage` is OpenAI's: what was read from or written to the provider's cache is part of its prompt tokens.
    """
    details = usage.get("prompt_tokens_details") or {}
    cached, written = details.get("cached_tokens") or 0, details.get("cache_write_tokens") or 0
    fresh = (usage.get("prompt_tokens") or 0) - cached - written
    per_million = (
        fresh * price.input
        + cached * _else(price.cached_input, price.input)
        + written * _else(price.cache_write, price.input)
        + (usage.get("completion_tokens") or 0) * price.output
    )
    return per_million / 1_000_000


def _else(price: float | None, fallback: float) -> float:
    return fallback if price is None else price
