"""Which models play a run's roles, and whether they can be asked here: settled before anything is created."""

import os
from collections.abc import Mapping
from typing import Any

from sia_events import app
from sia_events.errors import Unusable
from sia_events.infra.providers.finder import ADAPTERS, lacks
from sia_events.infra.providers.prices import pricing
from sia_events.shared.events import RunSettings
from sia_events.shared.providers import split_model
from sia_events.shared.settings import Settings


def cast(settings: Settings, named: Mapping[str, str | None], backend: str | None) -> dict[str, Any]:
    """The run settings of its models: those `named` for it, else the configured roles', else the embedded ones.

    The feedback-agent has the meta-agent's model unless one is named for it; where either has one, LLM agents write.
    """
    roles = settings.roles
    meta = named.get("meta_model") or roles.meta
    feedback = named.get("feedback_model") or roles.feedback
    default = RunSettings.model_fields["target_model"].default
    return {
        "target_model": named.get("target_model") or roles.target or default,
        "meta_model": meta or feedback,
        "feedback_model": feedback or meta,
        "backend": backend or ("direct" if meta or feedback else "builtin"),
    }


def require_askable(settings: Settings, wanted: RunSettings, environ: Mapping[str, str] = os.environ) -> None:
    """Raises Unusable for a model that nobody here answers for, and for a limit in dollars that cannot be kept."""
    if wanted.backend != "builtin" and not wanted.meta_model:
        raise Unusable(
            f"--backend {wanted.backend} needs a model: --meta-model provider/name, or [roles] in config.toml; "
            "nothing was written"
        )
    hosted = wanted.backend != "builtin"
    if hosted and wanted.backend not in app.backends():
        there = ", ".join(sorted(app.backends()))
        mend = "pip install 'sia-events[claude]'" if wanted.backend == "claude" else f"take one of {there}"
        raise Unusable(f"--backend {wanted.backend} is not installed here: {mend}; nothing was written")
    asked = {wanted.target_model, *((wanted.meta_model, wanted.feedback_model) if hosted else ())} - {None}
    for model in sorted(filter(None, asked)):
        name, rest = split_model(model)
        if name not in settings.providers or not rest:
            known = ", ".join(sorted(settings.providers))
            raise Unusable(f"no provider of the model {model!r}: it is provider/name, of {known}; nothing was written")
        provider = settings.providers[name]
        if provider.kind in ADAPTERS and (missing := lacks(provider, environ)):
            raise Unusable(f"{model}: {missing}; nothing was written. sia doctor shows which providers are ready")
    require_prices(settings, wanted)


def require_prices(settings: Settings, wanted: RunSettings) -> None:
    """Raises Unusable for a limit in dollars on a model without a price: no call of it would be made."""
    hosted = (wanted.meta_model, wanted.feedback_model) if wanted.backend != "builtin" else ()
    usd = pricing(settings.providers, settings.prices)
    for model in sorted(filter(None, {wanted.target_model, *hosted})):
        if wanted.budget.usd is not None and usd(model, {"prompt_tokens": 1, "completion_tokens": 1}) is None:
            raise Unusable(
                f"a limit in dollars needs the price of {model}, which nobody knows here; nothing was written. "
                f'State it under [prices."{model}"] in config.toml, or limit tokens or calls instead'
            )


def is_local(settings: Settings, wanted: RunSettings) -> bool:
    """Whether the embedded model has to be there for the run."""
    models = (wanted.target_model, wanted.meta_model, wanted.feedback_model)
    kinds = [
        settings.providers[split_model(m)[0]].kind for m in models if m and split_model(m)[0] in settings.providers
    ]
    return "local" in kinds
