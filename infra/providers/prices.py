"""What a model call costs: the user's prices over those that come with the package; unknown is None and never 0."""

import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from sia_events.shared.providers import FREE, Price, Provider, cost, split_model


def built_in_prices() -> Mapping[str, Price]:
    """The prices of `prices.toml`, by provider/model."""
    rows = tomllib.loads((files("sia_events.infra.providers") / "prices.toml").read_text())
    return {model: Price.model_validate(row) for model, row in rows.items()}


def pricing(
    table: Mapping[str, Provider], prices: Mapping[str, Price]
) -> Callable[[str, Mapping[str, Any]], float | None]:
    """A function from a model and OpenAI's usage of a call to USD, None where nobody knows the model's price.

    A model is looked up as provider/model and then, in `prices` alone, as "provider/*". Models of our own cost nothing.
    """
    known = {**built_in_prices(), **prices}

    def usd(model: str, usage: Mapping[str, Any]) -> float | None:
        name = split_model(model)[0]
        price = known.get(model) or prices.get(f"{name}/*")
        if price is not None:
            return cost(price, usage)
        return 0.0 if name in table and table[name].kind in FREE else None

    return usd
